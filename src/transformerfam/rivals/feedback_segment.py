"""TransformerFM, the feedback memory segment: a layer sees the keys and values of its own outputs of past segments.

The outputs of the last m segments are rows in front of a segment, replaced in every layer by that layer's own, so
that the layer makes `QKV(norm(O))` of them itself. What their rows become is not used.

Source: section C.2 of arXiv 2404.09173.
"""

import torch

from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.rival import Rival, RivalPiece


class FeedbackSegment(Rival):
    """Carry every layer's outputs of the last `num_memory_segments` segments."""

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return empty places for the outputs; how many of them hold any, `Lane.num_remembered` says."""
        length = self.config.num_memory_segments * self.config.block_size
        return {f"outputs.{i}": self.zeros(batch_size, length, self.hidden_size) for i in range(len(self.layouts))}

    def num_rows(self, lane: Lane) -> int:
        """Return the rows of outputs in front of a segment."""
        return min(lane.num_remembered, self.config.num_memory_segments) * self.config.block_size

    def rows_in_front(self, lane: Lane) -> torch.Tensor:
        """Return rows for the outputs, empty so far."""
        return self.zeros(len(lane.rows), self.num_rows(lane), self.hidden_size)

    def enter_layer(self, piece: RivalPiece, layer_idx: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Put the layer's outputs of past segments in the rows in front."""
        if not piece.num_front:
            return hidden_BTD
        outputs = piece.lane.memory[f"outputs.{layer_idx}"][:, -piece.num_front :]
        return torch.cat((outputs.to(hidden_BTD.dtype), hidden_BTD[:, piece.num_front :]), dim=1)

    def leave_layer(self, piece: RivalPiece, layer_idx: int, hidden_BTD: torch.Tensor) -> None:
        """Collect the tokens' outputs, and make a whole segment of them the last one that is remembered."""
        name, new = f"outputs.{layer_idx}", hidden_BTD[:, piece.tokens]
        if name in piece.lane.scratch:
            new = torch.cat((piece.lane.scratch[name], new), dim=1)
        if piece.completes:
            before = piece.lane.memory[name][:, self.config.block_size :]
            piece.updates[name] = torch.cat((before, new.to(before.dtype)), dim=1)
        else:
            piece.scratch[name] = new


RIVAL = FeedbackSegment
