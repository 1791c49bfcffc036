"""Next-token loss and accuracy over a long text, in constant memory."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.provenance import provenance, weights_of
from transformerfam.tasks.text import stream_text, stream_token_ids
from transformerfam.tasks.unknown_words import known_pieces

PIECE_TOKENS = 256
"""Tokens whose logits are held at once; with 49,152 words they take 50 MB."""


def evaluate_next_token(
    model: Any,
    tokenizer: Any,
    path: str | Path,
    *,
    num_tokens: int | None = None,
    segment_tokens: int | None = None,
    system: str = "fam",
    model_name: str = "unnamed",
    seed: int = 0,
    progress: Callable[[int, int | None, ReadingState], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Predict every token of a UTF-8 text from all tokens before it; yield rows of loss and accuracy.

    The first token is read and not predicted.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        path: UTF-8 text file, folder of them, name of a held-out novel, or "-" for standard input.
        num_tokens: tokens to read at most; None is the whole file.
        segment_tokens: yield a row for every so many tokens besides the last row, which covers all of them.
        system: name for the rows.
        model_name: name for the rows.
        seed: number for the rows; nothing is drawn.
        progress: called after every piece with tokens done, tokens to do (None: unknown) and the state.

    Raises:
        TransformerFamError: the file is not UTF-8 or holds fewer than two tokens, or a number is out of range.
    """
    for name, value, least in (("num_tokens", num_tokens, 2), ("segment_tokens", segment_tokens, 1)):
        if value is not None and value < least:
            raise TransformerFamError(f"{name} is {value}, required is at least {least}; change {name}")

    def row(score: "_Score", first: int) -> dict[str, Any]:
        return {
            "task": "next-token",
            "system": system,
            "model": model_name,
            "seed": seed,
            "file": Path(path).name,
            "first_token": first,
            "num_tokens": score.num_read,
            "loss": score.loss_sum / max(1, score.num_predicted),
            "accuracy": score.num_correct / max(1, score.num_predicted),
            "num_predicted": score.num_predicted,
            **weights_of(model),
            **provenance(),
        }

    total, segment, segment_start = _Score(), _Score(), 0
    ids = stream_token_ids(stream_text(path), tokenizer, begins=True)
    pieces = rechunk(ids, PIECE_TOKENS, num_tokens, segment_tokens)
    pieces = known_pieces(pieces, tokenizer, Path(path).name, "take another text")
    for score, state in _scores(model, pieces):
        total.add(score)
        segment.add(score)
        if progress is not None:
            progress(total.num_read, num_tokens, state)
        if segment_tokens is not None and segment.num_read == segment_tokens:
            yield row(segment, segment_start)
            segment, segment_start = _Score(), total.num_read
    if total.num_predicted == 0:
        raise TransformerFamError(f"{path} holds {total.num_read} tokens, at least 2 are required; give a longer text")
    yield row(total, 0)


class _Score:
    """Sums over some tokens."""

    def __init__(self, num_read: int = 0, num_predicted: int = 0, loss_sum: float = 0.0, num_correct: int = 0) -> None:
        self.num_read = num_read
        self.num_predicted = num_predicted
        self.loss_sum = loss_sum  # nats
        self.num_correct = num_correct

    def add(self, other: "_Score") -> None:
        self.num_read += other.num_read
        self.num_predicted += other.num_predicted
        self.loss_sum += other.loss_sum
        self.num_correct += other.num_correct


@torch.no_grad()
def score_piece(
    model: Any, ids_BT: Tensor, state: ReadingState, before_BV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read one piece, and score the prediction of each of its tokens.

    Args:
        model: a model with a memory.
        ids_BT: the piece.
        state: what was read before; it advances.
        before_BV: logits after the token in front of the piece; None where there is none, and the first token is not
            predicted.

    Returns:
        The losses in nats and whether each token was the likeliest, both `(B, T)`, or `(B, T - 1)` without `before_BV`;
        and the logits after the piece, `(B, V)`.
    """
    logits_BTV = model(input_ids=ids_BT, past_key_values=state).logits.float()
    predicted_BTV, targets_BT = logits_BTV[:, :-1], ids_BT[:, 1:]
    if before_BV is not None:
        predicted_BTV, targets_BT = torch.cat([before_BV[:, None], predicted_BTV], dim=1), ids_BT
    loss_BT = F.cross_entropy(predicted_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
    return loss_BT, predicted_BTV.argmax(dim=-1) == targets_BT, logits_BTV[:, -1].clone()


def token_losses(
    model: Any, ids_BT: Tensor, update: Callable[[ReadingState], None] | None = None
) -> tuple[Tensor, Tensor, ReadingState]:
    """Read texts of one length side by side, in pieces, and score the prediction of every token but the first.

    Args:
        model: a model with a memory.
        ids_BT: the texts.
        update: called after every piece with the state.

    Returns:
        The losses in nats and whether each token was the likeliest, both `(B, T - 1)` and on the CPU; and the state.
    """
    with torch.no_grad():
        state: ReadingState = model.init_state(len(ids_BT))
    scores, before_BV = [], None
    for piece_BT in ids_BT.to(next(model.parameters()).device).split(PIECE_TOKENS, dim=1):
        loss_BT, is_right_BT, before_BV = score_piece(model, piece_BT, state, before_BV)
        scores.append((loss_BT.cpu(), is_right_BT.cpu()))
        if update is not None:
            update(state)
    losses, rights = zip(*scores, strict=True)
    return torch.cat(losses, dim=1), torch.cat(rights, dim=1), state


def _scores(model: Any, pieces: Iterable[list[int]]) -> Iterator[tuple[_Score, ReadingState]]:
    with torch.no_grad():
        state = model.init_state()
    device = next(model.parameters()).device
    before_BV = None
    for ids in pieces:
        loss_BT, is_right_BT, before_BV = score_piece(model, torch.tensor([ids], device=device), state, before_BV)
        yield _Score(len(ids), loss_BT.numel(), loss_BT.sum().item(), int(is_right_BT.sum())), state


def rechunk(
    pieces: Iterable[list[int]], num_tokens: int, limit: int | None = None, multiple: int | None = None
) -> Iterator[list[int]]:
    """Yield the same ids in pieces of `num_tokens`, the last one shorter.

    Args:
        pieces: lists of token ids, of any lengths.
        num_tokens: tokens per piece.
        limit: tokens at most, all together; None is all.
        multiple: also end a piece at every multiple of so many tokens.

    Where `pieces` ends with an error, what is held back comes first and the error after it.
    """
    buffer: list[int] = []
    num_done = 0

    def wanted() -> int:
        ends = [num_tokens]
        if multiple is not None:
            ends.append(multiple - num_done % multiple)
        if limit is not None:
            ends.append(limit - num_done)
        return min(ends)

    try:
        for piece in pieces:
            buffer += piece
            while (size := wanted()) and len(buffer) >= size:
                whole, buffer, num_done = buffer[:size], buffer[size:], num_done + size
                yield whole
            if limit is not None and num_done >= limit:
                return
    except (Exception, KeyboardInterrupt):
        if buffer:
            yield buffer
        raise
    if buffer:
        yield buffer
