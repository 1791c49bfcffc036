"""AutoCompressor: RMT whose memory is that of all segments, one after the other.

A segment is read as [summaries of all segments before | tokens | summary tokens]. What the summary tokens, the same
learned ones for every segment, are after the last layer is that segment's summary.

Source: Chevalier, Wettig, Ajith, Chen: Adapting Language Models to Compress Contexts (2023), sections 3.1 and 3.2.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.fam.initial import initial_prompt
from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.rival import Rival, RivalPiece


class AutoCompressor(Rival):
    """Carry `num_memory_tokens` summary vectors for every segment: bytes and time per token grow with the text."""

    has_memory = False
    names_of_rows = ("summary",)

    def build(self, model: PreTrainedModel) -> None:
        """Make the summary tokens."""
        self.summary = nn.Parameter(initial_prompt(model.get_input_embeddings(), self.config.num_memory_tokens))

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return no summary at all."""
        return {"summaries": self.summary.new_zeros(batch_size, 0, self.hidden_size)}

    def rows_in_front(self, lane: Lane) -> torch.Tensor:
        """Return the summaries of all segments."""
        return lane.memory["summaries"]

    def rows_behind(self, lane: Lane) -> torch.Tensor:
        """Return the summary tokens."""
        return self.summary.expand(len(lane.rows), -1, -1)

    def end_segment(self, piece: RivalPiece, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Put the segment's summary after those before it."""
        summaries = piece.lane.memory["summaries"]
        return {"summaries": torch.cat((summaries, hidden_BTD[:, -piece.num_behind :]), dim=1)}


RIVAL = AutoCompressor
