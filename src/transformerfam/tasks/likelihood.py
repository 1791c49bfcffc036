"""Which of several continuations a model finds the likeliest."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.ragged import padded
from transformerfam.tasks.text import encode_rest


@torch.no_grad()
def likeliest(model: Any, tokenizer: Any, question: list[int], choices: Sequence[str], state: ReadingState) -> int:
    """Return the choice with the highest likelihood per byte, as in `acc_norm` of the harness."""
    endings = [encode_rest(tokenizer, f" {choice}") for choice in choices]
    ids_BT, mask_BT = padded([torch.tensor([*question, *ending]) for ending in endings])
    device = next(model.parameters()).device
    longest = max(map(len, endings))
    output = model(
        input_ids=ids_BT.to(device),
        attention_mask=mask_BT.to(device),
        past_key_values=state.select([0] * len(choices)),
        logits_to_keep=longest + 1,
    )
    log_BTV = output.logits[:, :-1].float().log_softmax(-1).cpu()
    scores = []
    for row, (ending, choice) in enumerate(zip(endings, choices, strict=True)):
        of_ending = log_BTV[row, -len(ending) :].gather(1, torch.tensor(ending)[:, None])
        scores.append(float(of_ending.sum()) / len(choice.encode()))
    if not all(map(math.isfinite, scores)):
        raise TransformerFamError(f"the likelihoods of {list(choices)} are {scores}, required are finite ones")
    return max(range(len(scores)), key=scores.__getitem__)
