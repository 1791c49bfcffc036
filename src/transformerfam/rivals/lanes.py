"""Sequences that are at the same place of their segment, and what they carry."""

import dataclasses
from collections.abc import Callable, Sequence

import torch


@dataclasses.dataclass
class Lane:
    """Sequences that are at the same place.

    Attributes:
        rows: which sequences of the batch they are.
        memory: what outlives the segment, by name, `(B, ...)` each.
        scratch: what is collected during the segment and forgotten after it, by name.
        keys: of every layer `(B, G, S, K)`, the segment so far with the rows in front of it; empty before its first.
        values: likewise.
        fill: tokens in the segment.
        num_blocks: whole segments that were read.
        num_remembered: segments that the memory holds, those of a memory that was handed on included.
        num_front: rows in front of the segment.
    """

    rows: list[int]
    memory: dict[str, torch.Tensor]
    scratch: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    keys: list[torch.Tensor] = dataclasses.field(default_factory=list)
    values: list[torch.Tensor] = dataclasses.field(default_factory=list)
    fill: int = 0
    num_blocks: int = 0
    num_remembered: int = 0
    num_front: int = 0

    @property
    def num_slots(self) -> int:
        """Keys of the segment so far."""
        return self.keys[0].shape[2] if self.keys else 0

    def copy(self) -> "Lane":
        """Return a lane that shares the tensors."""
        return dataclasses.replace(
            self,
            rows=list(self.rows),
            keys=list(self.keys),
            values=list(self.values),
            memory=dict(self.memory),
            scratch=dict(self.scratch),
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor."""
        self.keys, self.values = [function(t) for t in self.keys], [function(t) for t in self.values]
        self.memory = {name: function(tensor) for name, tensor in self.memory.items()}
        self.scratch = {name: function(tensor) for name, tensor in self.scratch.items()}

    def select(self, indices: Sequence[int]) -> "Lane":
        """Return some of the lane's sequences as a separate lane."""
        lane = self.copy()
        if list(indices) != list(range(len(self.rows))):
            index = torch.as_tensor(indices)
            lane.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        lane.rows = [self.rows[i] for i in indices]
        return lane

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what the lane carries, by name."""
        named = {f"memory.{name}": tensor for name, tensor in self.memory.items()}
        named |= {f"scratch.{name}": tensor for name, tensor in self.scratch.items()}
        for part in ("keys", "values"):
            named |= {f"{part}.{i}": tensor for i, tensor in enumerate(getattr(self, part))}
        return named
