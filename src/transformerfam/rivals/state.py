"""What a rival carries from piece to piece.

The sequences of a batch are kept in *lanes*: those of one lane have read equally many tokens and are at the same
place of their segment, so that a rival never meets a ragged batch. Lanes split when their sequences part.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from transformerfam.decoder.identity import ModelIdentity
from transformerfam.decoder.slot import memory_in
from transformerfam.decoder.state import ReadingState, require_several, take_stored
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.files.tensors import load_tensors, metadata_form, refuse_to_write, require_finite, save_tensors
from transformerfam.rivals.config import RivalConfig
from transformerfam.rivals.lanes import Lane

STATE_FORMAT_VERSION = 1
LANE_PARTS = ("memory", "scratch", "keys", "values")
PLACES = ("fill", "num_blocks", "num_remembered", "num_front")


class RivalState(ReadingState):
    """Carry a rival's reading; see `ReadingState`.

    Its bytes grow within a segment, and with the text where the system says so.

    Attributes:
        config: the `RivalConfig` that it was made with.
        has_memory: whether the rival has a memory of fixed size.
    """

    why_no_gradients = "a rival's rows are split by their places; take those of a model with FAM"
    why_positions_grow = "full attention counts positions from the text's beginning"

    def __init__(self, lanes: Sequence[Lane], config: RivalConfig, identity: ModelIdentity, has_memory: bool) -> None:
        super().__init__(layers=[])
        self.config: RivalConfig = config
        self.identity = identity
        self._has_memory = has_memory
        self.set_lanes(lanes)
        self.begin_history()

    def set_lanes(self, lanes: Sequence[Lane]) -> None:
        """Replace the lanes; together they hold every sequence once."""
        self.lanes = list(lanes)
        placed = {row: lane for lane in lanes for row in lane.rows}
        assert sorted(placed) == list(range(sum(len(lane.rows) for lane in lanes))), "a sequence is missing or twice"
        self.block_fill = [placed[row].fill for row in range(len(placed))]
        self.num_blocks_per_row = [placed[row].num_blocks for row in range(len(placed))]

    @property
    def text_start(self) -> int | None:
        """0 where a segment never ends, else None."""
        memory: Any = memory_in(self.identity.model.get_decoder())
        return 0 if memory.is_endless else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for lane in self.lanes for t in lane.tensors().values())

    @property
    def has_memory(self) -> bool:
        """Whether there is a memory of fixed size, which random state passing can hand on."""
        return self._has_memory

    @property
    def carried(self) -> torch.Tensor:
        """The memory of every sequence as one row of numbers, `(1, B, 1, N)`: what random state passing hands on.

        Raises:
            TransformerFamError: there is no memory, or it grows with the text.
        """
        if not self.has_memory:
            raise TransformerFamError(f"{self.config.system} has no memory of fixed size that could be handed on")
        flat: dict[int, torch.Tensor] = {}
        for lane in self.lanes:
            parts = [lane.memory[name].flatten(1) for name in sorted(lane.memory)]
            flat |= dict(zip(lane.rows, torch.cat(parts, dim=1), strict=True))
        return torch.stack([flat[row] for row in range(self.batch_size)])[None, :, None]

    @property
    def first_carried(self) -> torch.Tensor | None:
        """The first part of the memory."""
        return next(iter(self.lanes[0].memory.values()), None)

    def shallow_copy(self) -> "RivalState":
        """Return a new state that shares the tensors."""
        twin = super().shallow_copy()
        twin.set_lanes([lane.copy() for lane in self.lanes])
        return twin

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RivalState":
        """Replace every tensor by `function(tensor)` and return the state."""
        for lane in self.lanes:
            lane.map(function)
        return self

    def go_on_from(self, other: "RivalState") -> None:
        """Take over the tensors and the place of a state of the same reading, which is not used any more."""
        super().go_on_from(other)
        self.set_lanes(other.lanes)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the batch rows `indices`, in that order."""
        super().batch_select_indices(indices)
        wanted = indices.tolist()
        lanes = []
        for lane in self.lanes:
            chosen = [(new, lane.rows.index(old)) for new, old in enumerate(wanted) if old in lane.rows]
            if chosen:
                part = lane.select([i for _, i in chosen])
                part.rows = [new for new, _ in chosen]
                lanes.append(part)
        self.set_lanes(lanes)

    def zero_memory(self) -> "RivalState":
        """Set the memory to zero; the current segment stays."""
        for lane in self.lanes:
            lane.memory = {name: torch.zeros_like(tensor) for name, tensor in lane.memory.items()}
        return self

    def swap_memory(self) -> "RivalState":
        """Give every sequence the memory of the previous one at the same place.

        Raises:
            TransformerFamError: one is alone.
        """
        for lane in self.lanes:
            require_several(len(lane.rows))
            lane.memory = {name: tensor.roll(1, dims=0) for name, tensor in lane.memory.items()}
        return self

    def initial_memory(self) -> "RivalState":
        """Put the memory of a reading that has read nothing in place of this one, where it has a fixed size."""
        for lane in self.lanes:
            begun = self.identity.model.init_state(len(lane.rows)).lanes[0].memory
            own = lane.memory.items()
            lane.memory = {name: begun[name] if name in begun else torch.zeros_like(tensor) for name, tensor in own}
        return self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: a rival's keys go through its pieces.

        Raises:
            TransformerFamError: always.
        """
        raise TransformerFamError("a RivalState serves models with a rival alone; call rivals.attach(model, config)")

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically.

        Raises:
            TransformerFamError: the folder does not exist, the disk is full, or the reading has numbers that are not
                finite; an old file is left as it was.
        """
        lanes = [{"rows": lane.rows} | {name: getattr(lane, name) for name in PLACES} for lane in self.lanes]
        metadata = {
            "kind": "rival state",
            "format_version": STATE_FORMAT_VERSION,
            "identity": self.identity_metadata(),
            "lanes": lanes,
        } | self.to_store()
        tensors = {
            f"{number}.{name}": tensor
            for number, lane in enumerate(self.lanes)
            for name, tensor in lane.tensors().items()
        }
        refuse_to_write(tensors, path)
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> "RivalState":
        """Read a state that was saved on the same model.

        Args:
            path: a file that `save` wrote.
            model: the model, with its rival, that continues it.

        Raises:
            CorruptFileError: the file is missing, foreign, damaged or of another version.
            StateMismatchError: it was made on another architecture, rival or dtype.

        Warns:
            UserWarning: it was made on other weights of the same architecture.
        """
        tensors, metadata = load_tensors(path, "rival state", STATE_FORMAT_VERSION)
        require_finite(tensors, path, "rival state")
        with torch.no_grad():
            state: RivalState = model.init_state(1)
        with metadata_form(path, "rival state"):
            state.read_with = state.identity.check(metadata["identity"], state.config, str(path))
        dtype, device = model.get_input_embeddings().weight.dtype, model.device
        stored = {tensor.dtype for name, tensor in tensors.items() if ".keys." in name}
        if stored - {dtype}:
            raise StateMismatchError(
                f"{path} holds keys of type {stored.pop()}, the model has {dtype}; load it into a model of the dtype "
                "that it was made on"
            )
        with metadata_form(path, "rival state"):
            state.set_lanes(_lanes_of(tensors, metadata["lanes"], device))
            vocab_size = model.get_input_embeddings().weight.shape[0]
            take_stored(state, metadata, vocab_size)
        return state


def _lanes_of(tensors: dict[str, torch.Tensor], places_of_lanes: Any, device: torch.device) -> list[Lane]:
    """Return the lanes of a file.

    Raises:
        ValueError: they are not what lanes can be.
    """
    rows = sorted(row for places in places_of_lanes for row in places["rows"])
    numbers = [places[name] for places in places_of_lanes for name in PLACES]
    parts = [name.split(".") for name in tensors]
    if not rows or rows != list(range(len(rows))) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"rows {rows} at places {numbers}")
    if any(int(part[0]) >= len(places_of_lanes) or part[1] not in LANE_PARTS for part in parts):
        raise ValueError("tensors of no lane")
    lanes = []
    for number, places in enumerate(places_of_lanes):
        own = {n.partition(".")[2]: t.to(device) for n, t in tensors.items() if n.startswith(f"{number}.")}
        lane = Lane(memory=_named(own, "memory"), scratch=_named(own, "scratch"), **places)
        for part in ("keys", "values"):
            by_layer = _named(own, part)
            setattr(lane, part, [by_layer[str(i)] for i in range(len(by_layer))])
        lanes.append(lane)
    return lanes


def _named(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one part, by the rest of their names."""
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
