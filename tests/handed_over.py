"""What a model is given to read."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Given = tuple[torch.Tensor, torch.Tensor | None]


@contextlib.contextmanager
def handed_over(model: Any, note: Callable[[], None] = lambda: None) -> Iterator[list[Given]]:
    """Yield a list of the pieces that `model.read` is given, `(B, T)` ids and mask; `note` is called after each."""
    read, given = model.read, []

    def keep(ids: Any, mask: Any) -> None:
        given.append((torch.as_tensor(ids), mask))
        note()

    def kept(pieces: Iterable[Any]) -> Iterator[Any]:
        for piece in pieces:
            keep(*(piece if isinstance(piece, tuple) else (piece, None)))
            yield piece

    def noted(ids: Any, state: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        if isinstance(ids, Iterator):
            return read(kept(ids), state, attention_mask, **options)
        keep(ids, attention_mask)
        return read(ids, state, attention_mask, **options)

    model.read = noted
    try:
        yield given
    finally:
        model.read = read
