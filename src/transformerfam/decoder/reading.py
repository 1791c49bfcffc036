"""The methods that every model with a memory has besides its own, or in their place."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from transformerfam.decoder.arguments import as_tensor, check_ids, own_mask
from transformerfam.decoder.cache_argument import rename_cache
from transformerfam.decoder.generation import GENERATION_METHODS
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import ReadInterrupted, StateMismatchError, TransformerFamError
from transformerfam.processes import process_share, uninterrupted

Progress = Callable[[int, Any, ReadingState], None]
"""Of (tokens done, tokens in all, or None where an iterator gives them, state)."""
Piece = tuple[torch.Tensor, torch.Tensor | None]
"""Token ids `(B, T)`, and the mask of their tokens; None: all."""


@torch.no_grad()
def read(
    self: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int] | Iterable[Any],
    state: ReadingState | None = None,
    attention_mask: torch.Tensor | None = None,
    progress: bool | Progress = False,
) -> ReadingState:
    """Read tokens of any number into a state, in constant memory and without logits.

    An iterator gives them in pieces, each `(T,)` or `(B, T)` ids as a tensor or a list, or, with padding, a tuple
    `(ids, attention_mask)`. Where pieces end changes nothing: what does not fill a block waits for the next piece. An
    iterator that fails, or gives what is refused, raises when all pieces before it have been read into `state`.

    Args:
        self: the converted model.
        input_ids: `(T,)` or `(B, T)` token ids, or an iterator of such pieces, which follow what the state has read;
            `generate` leaves the last token that it generated unread, so begin with that one, `state.unread_ids`.
        state: reading to continue, in place; None starts one.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, on either side; of a longer one the last T columns.
        progress: True draws a bar; a function is called with (tokens done, tokens in all, state) after every block; of
            an iterator the tokens in all are None.

    Returns:
        The state, advanced by the tokens.

    Raises:
        TransformerFamError: empty input, token ids that are no integers or out of range, a mask of another shape, or a
            batch that does not fit the state.
        ReadInterrupted: Ctrl-C; it carries the state and says how to resume. An iterator may have given more than the
            state holds: what did not fill a block yet.
    """
    is_whole = not _gives_pieces(input_ids)
    if not is_whole and attention_mask is not None:
        raise TransformerFamError(
            "attention_mask is given with an iterator, whose pieces carry their own; let it give tuples of "
            "(ids, attention_mask)"
        )
    pieces = _checked_pieces(self, [(input_ids, attention_mask)] if is_whole else input_ids)
    if is_whole:
        pieces = iter(list(pieces))
    if not (isinstance(progress, bool) or callable(progress)):
        raise TransformerFamError(f"progress is {progress!r}, required is True, False or a function")
    if state is not None and not isinstance(state, ReadingState):
        raise StateMismatchError(
            f"state is a {type(state).__name__}, required is one of this model; start one with model.init_state()"
        )
    total = None
    if state is None or is_whole:
        first = next(pieces)
        total = first[0].shape[1] if is_whole else None
        pieces = itertools.chain([first], pieces)
        state = self.init_state(len(first[0])) if state is None else state
    with _bar(total) if progress is True else contextlib.nullcontext(progress or None) as report:
        return _read_pieces(self, pieces, state, total, report)


def _gives_pieces(input_ids: Any) -> bool:
    """Whether this is an iterator of ids, or whatever else is neither an array nor a sequence."""
    is_one = isinstance(input_ids, Sequence | Mapping | Set | torch.Tensor) or hasattr(input_ids, "__array__")
    return isinstance(input_ids, Iterable) and not is_one


def _checked_pieces(model: PreTrainedModel, pieces: Iterable[Any]) -> Iterator[Piece]:
    """Yield pieces as `(B, T)` ids on the model's device, and their mask where there is padding.

    Raises:
        TransformerFamError: there is none, or one that cannot be read.
    """
    vocab_size, is_empty = model.get_input_embeddings().weight.shape[0], True
    for piece in pieces:
        is_empty = False
        given, given_mask = piece if isinstance(piece, tuple) and len(piece) == 2 else (piece, None)
        ids = as_tensor("input_ids", given, "token ids, (tokens,) or (batch, tokens)")
        check_ids(ids, vocab_size)
        if ids.dim() not in (1, 2):
            raise TransformerFamError(
                f"token ids have shape {tuple(ids.shape)}, required is (tokens,) or (batch, tokens)"
            )
        ids_BT = (ids[None] if ids.dim() == 1 else ids).to(model.device, torch.long)
        mask = None
        if given_mask is not None:
            mask = as_tensor("attention_mask", given_mask, "a 0 or 1 for every token").to(model.device)
            mask = own_mask(mask[None] if mask.dim() == 1 else mask, *ids_BT.shape)
        yield ids_BT, None if mask is None or bool(mask.all()) else mask
    if is_empty:
        check_ids(None, vocab_size)


def _blocks(pieces: Iterable[Piece], state: ReadingState) -> Iterator[Piece]:
    """Yield what is read at once: what fills the state's block, or ends at padding, where any chunk is right.

    Where `pieces` ends with an error, what is held back comes first and the error after it.
    """
    held: list[torch.Tensor] = []
    num_held = 0

    def room() -> int:
        return state.config.block_size - state.block_fill[0]

    try:
        for ids_BT, mask_BT in pieces:
            if held and (mask_BT is not None or len(ids_BT) != len(held[0])):
                yield torch.cat(held, dim=1), None
                held, num_held = [], 0
            if mask_BT is not None:
                done = 0
                while done < ids_BT.shape[1]:
                    columns = slice(done, done + room())
                    yield ids_BT[:, columns], mask_BT[:, columns]
                    done = columns.stop
                continue
            held.append(ids_BT)
            num_held += ids_BT.shape[1]
            if num_held < room():
                continue
            rest = torch.cat(held, dim=1)
            while rest.shape[1] >= (count := room()):
                yield rest[:, :count], None
                rest = rest[:, count:]
            held, num_held = [rest] if rest.shape[1] else [], rest.shape[1]
    except Exception:
        if held:
            yield torch.cat(held, dim=1), None
        raise
    if held:
        yield torch.cat(held, dim=1), None


def _read_pieces(
    model: Any, pieces: Iterable[Piece], state: ReadingState, total: int | None, report: Progress | None
) -> ReadingState:
    decoder, done = model.get_decoder(), 0
    try:
        for ids_BT, mask_BT in _blocks(pieces, state):
            with uninterrupted():  # half a piece would leave some layers in front of others
                decoder(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=state)
                done += ids_BT.shape[1]
            if report is not None:
                report(done, total, state)
    except KeyboardInterrupt as error:
        raise ReadInterrupted(state, done, of_iterator=total is None) from error
    return state


@contextlib.contextmanager
def _bar(total: int | None) -> Iterator[Progress]:
    """Draw a bar, and yield what moves it."""
    is_silent = process_share()[0] > 0
    with tqdm(desc="reading", total=total, unit=" tokens", unit_scale=True, disable=is_silent) as bar:

        def move(done: int, _: int | None, state: ReadingState) -> None:
            bar.set_postfix_str(f"state {state.num_bytes / 1e6:.1f} MB", refresh=False)
            bar.update(done - bar.n)

        yield move


def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Call the class's own `forward`; the state may come as `past_key_values` or as `cache`.

    Raises:
        TransformerFamError: both are given.
    """
    return type(self).forward(self, *args, **rename_cache(args, kwargs))


READER_METHODS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "read": read,
    **GENERATION_METHODS,
}
"""What every model with a memory has in place of its class's methods, or besides them."""
