"""Named keys measured: how many of several keys are recalled, by number, order and the filler after them."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.named_keys import NamedKeys, NamedKeysText, draw_named_keys
from transformerfam.tasks.passkey import FIRST_KEY, LAST_KEY
from transformerfam.tasks.provenance import questions_of, weights_of
from transformerfam.tasks.ragged import greedy_tokens, padded, read_ragged
from transformerfam.tasks.texts_evaluation import TextsEvaluation
from transformerfam.tasks.unknown_words import require_filler, require_wording

TASK = "named-keys"
KEY_BITS = math.log2(LAST_KEY + 1 - FIRST_KEY)
"""The information of a key of five digits, in bits."""


@dataclass(kw_only=True)
class NamedKeysEvaluation(TextsEvaluation):
    """Give several keys by their names, and query each of them after filler of several lengths.

    The filler is the text between the last key and the question.

    Raises:
        TransformerFamError: a length or a number is out of its range.
    """

    num_told: Sequence[int] = (1,)
    """Names in a text; each number has its own texts."""

    num_retold: int = 0
    """Names that are given a second key, which counts; at most all names."""

    apart: tuple[int, int] = (0, 0)
    """Least and most tokens of filler between two tellings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_numbers("num_told", self.num_told, 1)
        self.require_numbers("num_retold", [self.num_retold], 0)
        if not 0 <= self.apart[0] <= self.apart[1]:
            raise TransformerFamError(f"apart is {list(self.apart)}, required is 0 <= least <= most; change apart")

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, evaluate, and yield one row per question.

        Args:
            model: a model with a memory.
            tokenizer: its tokenizer.
        """
        text = self.text(tokenizer)
        total = len(self.num_told) * self.num_texts * self.filler_lengths[-1]
        done = 0
        for num_told in self.num_told:
            texts = self.texts(num_told)
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                yield from self._batch(model, text, batch, start, num_told, (done, total))
                done += len(batch) * self.filler_lengths[-1]

    def texts(self, num_told: int) -> list[NamedKeys]:
        """Return the keys of the texts with so many names; with more texts the first ones stay the same."""
        draw = random.Random(f"{self.seed}/{num_told}/named keys")
        num_retold = min(self.num_retold, num_told)
        return [draw_named_keys(draw, num_told, num_retold, self.apart) for _ in range(self.num_texts)]

    def text(self, tokenizer: Any) -> NamedKeysText:
        """Return what writes the texts.

        Raises:
            TransformerFamError: the tokenizer knows too little of the filler or of the sentences, or no digits.
        """
        text = NamedKeysText(tokenizer, self.filler)
        require_filler(tokenizer, text.filler)
        require_wording(tokenizer, text.wording_ids, "of named keys")
        return text

    def questions(self, filler_digest: str) -> dict[str, str]:
        """Return the field `questions` of rows, by the digest of the filler's text."""
        return questions_of(filler_digest, self.num_retold, list(self.apart))

    def _batch(
        self, model: Any, text: NamedKeysText, batch: list[NamedKeys], first: int, num_told: int, share: tuple[int, int]
    ) -> Iterator[dict[str, Any]]:
        starts_B = torch.arange(first, first + len(batch)) * 7919  # every text has its own place in the filler
        state = read_ragged(
            model,
            [torch.tensor(text.start_ids + text.intro_ids(k, int(s))) for k, s in zip(batch, starts_B, strict=True)],
        )
        num_read = 0
        for length in self.filler_lengths:
            if num_read < length:
                size = state.config.block_size
                pieces = text.filler.rows_in_pieces(starts_B + num_read, length - num_read, size)
                state = model.read(pieces, state, progress=self.moved(share, len(batch), num_read))
                num_read = length
            for order in range(num_told):
                yield from self._ask(model, text, batch, first, state.fork(), length, order)

    def _ask(
        self,
        model: Any,
        text: NamedKeysText,
        batch: list[NamedKeys],
        first: int,
        state: ReadingState,
        length: int,
        order: int,
    ) -> Iterator[dict[str, Any]]:
        """Query every text for the name whose newest key was given as number `order`."""
        asked = [list(keys.newest.items())[order] for keys in batch]
        ids_BT, mask_BT = padded([torch.tensor(text.question_ids(name)) for name, _ in asked])
        wanted = [text.key_ids(key) for _, key in asked]
        mask: Tensor | None = None if bool(mask_BT.all()) else mask_BT
        nats_B = _surprise(model, ids_BT, mask_BT, state.fork(), wanted)
        said_BT = greedy_tokens(model, ids_BT, state, max(map(len, wanted)), mask)
        for row, ((name, key), key_ids) in enumerate(zip(asked, wanted, strict=True)):
            said = said_BT[row, : len(key_ids)].tolist()
            old = batch[row].outdated.get(name, [])
            yield self.row(
                TASK,
                text.filler.name,
                length,
                first + row,
                num_told=len(batch[row].newest),
                order=order,
                key=key,
                answer=text.decode(said),
                correct=said == key_ids,
                bits=round(KEY_BITS - nats_B[row] / math.log(2), 3),
                is_retold=bool(old),
                is_outdated=any(said == text.key_ids(other) for other in old),
                **self.questions(text.filler.digest),
                **weights_of(model),
            )


@torch.no_grad()
def _surprise(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, state: ReadingState, keys: Sequence[Sequence[int]]
) -> list[float]:
    """Return how little a state reveals of each key: minus the logarithm of its probability, in nats.

    The information of a key, less that, is on average at most what the state holds of it (the bound of Barber and
    Agakov), and below 0 where the model is sure of another key.

    Args:
        model: a model with a memory.
        ids_BT: the questions, padded on the left.
        mask_BT: their tokens.
        state: what was read; it advances.
        keys: tokens of the keys.
    """
    device = next(model.parameters()).device
    keys_BT = pad_sequence([torch.tensor(key) for key in keys], batch_first=True, padding_value=-1)
    is_key_BT = keys_BT >= 0
    known_BT = keys_BT[:, :-1].clamp(min=0)
    mask = None
    if not bool(mask_BT.all()):
        mask = torch.cat([mask_BT, torch.ones_like(known_BT)], dim=1).to(device)
    output = model(
        input_ids=torch.cat([ids_BT, known_BT], dim=1).to(device),
        attention_mask=mask,
        past_key_values=state,
        logits_to_keep=keys_BT.shape[1],
    )
    log_p_BTV = output.logits.float().log_softmax(dim=-1).cpu()
    log_p_BT = log_p_BTV.gather(-1, keys_BT.clamp(min=0)[..., None])[..., 0]
    nats: list[float] = (-log_p_BT * is_key_BT).sum(dim=1).tolist()
    return nats
