"""What every reading carries, whatever its memory is: sequences, their places in their blocks, and copies of it all.

Each kind of memory has its own kind of state. Models, training and tasks use what is defined here.
"""

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch

from transformerfam.decoder.arguments import LARGEST_NUMBER, as_tensor, require_integer
from transformerfam.decoder.identity import SEVERAL, ReadWith, UnboundIdentity
from transformerfam.decoder.step import SteppedCache
from transformerfam.errors import StateMismatchError, TransformerFamError

HISTORY_MODULUS = (1 << 61) - 1
"""Histories are numbers below this one."""


class ReadingState(SteppedCache, abc.ABC):
    """Carry a reading: a transformers cache that `model.init_state` makes.

    Under `torch.no_grad` it advances in place; `fork()` first to keep a reading for a second question. While
    gradients are recorded its tensors are replaced, so that the graph reaches back through all blocks.

    Attributes:
        config: the configuration that it was made with.
        identity: the model that it was made on.
        read_with: the weights that it has read with; see `ModelIdentity.read_with`.
        histories: of every sequence a number made from the tokens that it has read, see `history_of`; None where they
            are not known, as after embeddings.
        unread_ids: of every sequence the token that `generate` generated last, which is not read yet, or None.
        is_left_by_beams: whether the sequences are beams that a search has left.
        is_generating: whether `generate` is running.
    """

    config: Any
    identity: Any
    block_fill: list[int]
    num_blocks_per_row: list[int]
    read_with: ReadWith
    histories: list[int | None]
    unread_ids: list[int | None]
    why_no_gradients: str | None = None  # why none reach the hidden states that single layers give
    why_positions_grow = ""  # with the text, where `text_start` is not None
    is_left_by_beams = False
    is_generating = False
    _records = False
    _before: tuple[Any, torch.Tensor, torch.Tensor | None, list[list[int]] | None] | None = None  # see `note_input`

    def begin_history(self) -> None:
        """Note that no sequence has read a token."""
        self.read_with = {}
        self.histories, self.unread_ids = [0] * self.batch_size, [None] * self.batch_size

    def identity_metadata(self) -> dict[str, Any]:
        """Return what `ModelIdentity.check` compares: the model, and the weights that this was read with."""
        metadata: dict[str, Any] = self.identity.to_metadata(self.config, self.read_with)
        return metadata

    def require_own_rows(self) -> None:
        """Refuse a state that beam search has left.

        Raises:
            StateMismatchError: the sequences are beams.
        """
        if self.is_left_by_beams:
            raise StateMismatchError(
                "the state was left by beam search, which keeps no state of the text that it returns; fork() the state "
                "before, and read() that text"
            )

    # What it holds

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.block_fill)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence has read."""
        size = self.config.block_size
        return tuple(n * size + fill for n, fill in zip(self.num_blocks_per_row, self.block_fill, strict=True))

    @property
    def text_start(self) -> int | None:
        """Position of a text's first token where positions are counted from there; None where they stay in a block."""
        return None

    @property
    def num_tokens_read(self) -> int:
        """Tokens that the longest sequence has read."""
        return max(self.row_lengths)

    @property
    def num_blocks(self) -> int:
        """Whole blocks that the longest sequence has read."""
        return max(self.num_blocks_per_row)

    @property
    @abc.abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all tensors."""

    @property
    @abc.abstractmethod
    def has_memory(self) -> bool:
        """Whether there is a memory of fixed size, which random state passing can hand on."""

    @property
    @abc.abstractmethod
    def carried(self) -> torch.Tensor:
        """The memory that random state passing hands on: of FAM `(L, B, F, D)`, of others `(1, B, 1, N)`."""

    @property
    @abc.abstractmethod
    def first_carried(self) -> torch.Tensor | None:
        """What the lowest layer carries from block to block; None where nothing is."""

    def to_store(self) -> dict[str, Any]:
        """Return what `take_stored` takes."""
        return {name: getattr(self, name) for name in ("histories", "unread_ids", "is_left_by_beams")}

    # Copies

    def shallow_copy(self) -> Self:
        """Return a new state that shares the tensors: the input of a pure block step while gradients are recorded.

        Under `torch.no_grad` use `fork()`, since the tensors are then written in place.
        """
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__
        twin._records, twin._before, twin.is_generating = False, None, False
        twin.histories, twin.unread_ids = list(self.histories), list(self.unread_ids)
        return twin

    @abc.abstractmethod
    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Replace every tensor by `function(tensor)` and return the state."""

    @abc.abstractmethod
    def go_on_from(self, other: Self) -> None:
        """Take over the tensors and the place of a state of the same reading, which is not used any more."""
        self.histories, self.unread_ids, self.read_with = other.histories, other.unread_ids, other.read_with
        self.is_left_by_beams = other.is_left_by_beams

    @abc.abstractmethod
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        rows = indices.tolist()
        self.histories = [self.histories[row] for row in rows]
        self.unread_ids = [self.unread_ids[row] for row in rows]

    @abc.abstractmethod
    def zero_memory(self) -> Self:
        """Set what was remembered to zero: the control `..._memory_zeroed`."""

    @abc.abstractmethod
    def swap_memory(self) -> Self:
        """Give every sequence the memory of the previous one: the control `..._memory_swapped`.

        Raises:
            TransformerFamError: there is one sequence alone.
        """

    @abc.abstractmethod
    def initial_memory(self) -> Self:
        """Put the memory of a reading that has read nothing in place of this one: the control `..._memory_initial`."""

    def fork(self) -> Self:
        """Return an independent copy; this one stays as it is."""
        return self.shallow_copy().map(torch.clone)

    __copy__ = fork  # a copy that shared tensors would move this state with what it reads

    def detach(self) -> Self:
        """Cut the graph and return the state."""
        return self.map(torch.Tensor.detach)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of a pickle, with which the next model that continues the state is compared."""
        left_out = {"identity": UnboundIdentity(self.identity_metadata()), "read_with": {}, "step": None}
        return self.__dict__ | left_out | {"_records": False, "_before": None, "is_generating": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.fork()
        twin.identity = copy.deepcopy(self.identity, memo)
        if twin.identity.model is not self.identity.model:  # its parameters are others
            twin.read_with = {part: key for part, key in self.read_with.items() if key == SEVERAL}
        return twin

    def leave_inference_mode(self) -> None:
        """Make tensors that `torch.inference_mode` has left usable outside of it, where that is over."""
        if not torch.is_inference_mode_enabled():
            self.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def leave_graph(self) -> None:
        """Copy tensors that a graph needs, where gradients are not recorded and tensors are written in place."""
        if not torch.is_grad_enabled():
            self.map(lambda tensor: tensor.clone() if tensor.grad_fn is not None else tensor)

    def select(self, rows: Sequence[int] | torch.Tensor) -> Self:
        """Return a new state of the batch rows `rows`, in that order; a row may appear more than once.

        Raises:
            TransformerFamError: there is no such row, or none is named.
        """
        indices = as_tensor("rows", rows, "numbers of sequences")
        numbers = indices.tolist() if indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1 else []
        if not numbers or not 0 <= min(numbers) <= max(numbers) < self.batch_size:
            raise TransformerFamError(
                f"rows are {rows!r}, required are numbers of sequences from 0 to {self.batch_size - 1}; change rows"
            )
        twin = self.shallow_copy()
        twin.batch_select_indices(indices)
        return twin

    def make_room(self) -> None:
        """Restore what `drop_complete_block` freed."""

    def drop_complete_block(self) -> None:
        """Free a complete block's keys and values: no backward pass needs them."""

    # The contract of a transformers cache

    @property
    def is_compileable(self) -> bool:
        """False: generation shall not compile around this cache."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back: from `activate_past_recording` on, which costs a fork per input."""
        return self._records

    def activate_past_recording(self) -> None:
        """Keep a fork from before the last input from now on, so that `crop` can go back (assisted decoding)."""
        self._records = True

    def note_input(self, inputs_BTD: torch.Tensor, valid_BT: torch.Tensor | None, ids: list[list[int]] | None) -> None:
        """Note what is about to be read, if `crop` shall be able to take it back."""
        if self._records:
            self._before = self.fork(), inputs_BTD, valid_BT, ids

    def note_tokens(self, ids: Sequence[Sequence[int]] | None, counts: Sequence[int]) -> None:
        """Note the tokens that every sequence has read, or that their ids are not known."""
        for row, count in enumerate(counts):
            if count:
                history = self.histories[row]
                self.histories[row] = None if ids is None or history is None else history_of(ids[row], history)
                self.unread_ids[row] = None

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: a fork from before the last input reads the others again.

        Args:
            tokens_to_remove: minus their number; 0 keeps all.

        Raises:
            TransformerFamError: `activate_past_recording` was not called before that input, or it was shorter.
        """
        tokens_to_remove = require_integer("tokens_to_remove", tokens_to_remove, least=-LARGEST_NUMBER)
        before, self._before = self._before, None
        if tokens_to_remove == 0:
            return
        num_kept = 0 if before is None else before[1].shape[1] + tokens_to_remove
        if before is None or tokens_to_remove > 0 or num_kept < 0:
            raise TransformerFamError(
                f"a {type(self).__name__} cannot take back {abs(tokens_to_remove)} tokens, since its memory holds no "
                "single tokens; fork() the state before reading on, or call activate_past_recording() before the input"
            )
        fork, inputs_BTD, mask, ids = before
        self.go_on_from(fork)
        if num_kept:
            self._records, histories = False, list(self.histories)
            mask = None if mask is None else mask[:, :num_kept]
            decoder, num_before = self.identity.model.get_decoder(), self.row_lengths
            decoder(inputs_embeds=inputs_BTD[:, :num_kept], attention_mask=mask, past_key_values=self)
            self._records, self.histories = True, histories
            counts = [now - before for now, before in zip(self.row_lengths, num_before, strict=True)]
            self.note_tokens(ids and [row[:count] for row, count in zip(ids, counts, strict=True)], counts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens that the longest sequence has read; 0 inside of `generate` and of the model's layers.

        There the state itself says what of an input is new and where it is.
        """
        return 0 if self.is_generating or self.step is not None else self.num_tokens_read

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Choose and order batch rows, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Refuse: how a reading starts is the model's affair.

        Raises:
            TransformerFamError: always.
        """
        name = type(self).__name__
        raise TransformerFamError(f"a {name} cannot be reset; start a new one with model.init_state()")


def history_of(ids: Sequence[int], before: int = 0) -> int:
    """Return a number that distinguishes one run of tokens from another, and continues that of the tokens before it."""
    for token in ids:
        before = (before * 1_000_003 + token + 1) % HISTORY_MODULUS
    return before


def take_stored(state: ReadingState, metadata: Mapping[str, Any], vocab_size: int) -> None:
    """Take what every reading has out of a file's metadata; what files that were written before lack is not known.

    Raises:
        ValueError: it is not what a reading has; the message names the field.
    """
    num_rows = state.batch_size
    for name, limit in (("histories", HISTORY_MODULUS), ("unread_ids", vocab_size)):
        values = metadata.get(name, [None] * num_rows)
        if not isinstance(values, list) or len(values) != num_rows:
            raise ValueError(f"{name} is {values!r}, of {num_rows} sequences")
        for value in values:
            if value is not None and not (type(value) is int and 0 <= value < limit):
                raise ValueError(f"{name} has {value!r}")
        setattr(state, name, list(values))
    is_left = metadata.get("is_left_by_beams", False)
    if type(is_left) is not bool:
        raise ValueError(f"is_left_by_beams is {is_left!r}")
    state.is_left_by_beams = is_left


def require_several(batch_size: int) -> None:
    """Refuse to swap memories where there is one sequence alone.

    Raises:
        TransformerFamError: there is.
    """
    if batch_size < 2:
        raise TransformerFamError(
            "a memory is swapped for that of another sequence, and there is one alone; read at least 2 side by side"
        )
