"""Texts of different lengths read side by side, and the likeliest tokens after them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from transformerfam.decoder.state import ReadingState

Slice = Callable[[int, int], Tensor]
"""Gives the tokens of a text from one place to another, `(end - begin,)`."""


def side_by_side(
    texts: Sequence[Slice], begins: Sequence[int], ends: Sequence[int], num_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield texts of any length, and where they end, for `model.read`: the same memory at any length.

    Args:
        texts: one for each row.
        begins: where each continues.
        ends: where each ends, its last token not included.
        num_tokens: of every row at once; those of a block are read as fast as more are.

    Yields:
        Token ids `(B, at most num_tokens)` and the mask of their tokens, padded on the left.
    """
    done = list(begins)
    while done != list(ends):
        stops = [min(at + num_tokens, end) for at, end in zip(done, ends, strict=True)]
        yield padded([text(at, stop) for text, at, stop in zip(texts, done, stops, strict=True)])
        done = stops


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of different lengths as `(B, T)`, padded on the left, and the mask of their tokens."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row_idx, row in enumerate(rows):
        ids_BT[row_idx, longest - len(row) :] = row
        mask_BT[row_idx, longest - len(row) :] = 1
    return ids_BT, mask_BT


def read_ragged(
    model: Any,
    rows: Sequence[Tensor],
    state: ReadingState | None = None,
    progress: Callable[[int, int, ReadingState], None] | bool = False,
) -> ReadingState:
    """Read rows of different lengths into a state; `progress` is that of `read`."""
    ids_BT, mask_BT = padded(rows)
    if ids_BT.shape[1] == 0 and state is not None:
        return state
    mask = None if bool(mask_BT.all()) else mask_BT
    read: ReadingState = model.read(ids_BT, state, attention_mask=mask, progress=progress)
    return read


@torch.no_grad()
def greedy_tokens(
    model: Any,
    ids_BT: Tensor,
    state: ReadingState,
    num_tokens: int,
    attention_mask: Tensor | None = None,
    end_ids: Collection[int] = (),
) -> Tensor:
    """Feed `ids_BT` and return the likeliest next tokens, one after the other, (B, at most `num_tokens`).

    The state advances over the input and all tokens but the last. `attention_mask` is of an input padded on the left.
    The last tokens are `num_tokens`, or earlier ones that are in every row of `end_ids`.
    """
    said = []
    for _ in range(num_tokens):
        device = next(model.parameters()).device
        mask = None if attention_mask is None else attention_mask.to(device)
        output = model(input_ids=ids_BT.to(device), attention_mask=mask, past_key_values=state, logits_to_keep=1)
        ids_BT, attention_mask = output.logits[:, -1:].argmax(dim=-1), None
        said.append(ids_BT.cpu())
        if end_ids and all(token in end_ids for token in said[-1].flatten().tolist()):
            break
    return torch.cat(said, dim=1)
