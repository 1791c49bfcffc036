"""Recurrent memory transformer, RMT: memory tokens whose outputs at the top are the next segment's inputs.

A segment is read as [read tokens | tokens | write tokens]. Both groups are the current memory; each sees all of
its own group, as in the paper. What the write tokens are after the last layer is the memory of the next segment.

Source: Bulatov, Kuratov, Burtsev: Recurrent Memory Transformer (2022), section 3.2.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.fam.initial import initial_prompt
from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.rival import Rival, RivalPiece


class RecurrentMemoryTransformer(Rival):
    """Carry `num_memory_tokens` embeddings; the first are learned."""

    names_of_rows = ("memory",)
    memory_rows_see_each_other = True

    def build(self, model: PreTrainedModel) -> None:
        """Make the first memory."""
        self.memory = nn.Parameter(initial_prompt(model.get_input_embeddings(), self.config.num_memory_tokens))

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return the learned memory for every sequence."""
        return {"tokens": self.memory.expand(batch_size, -1, -1)}

    def rows_in_front(self, lane: Lane) -> torch.Tensor:
        """Return the read tokens."""
        return lane.memory["tokens"]

    def rows_behind(self, lane: Lane) -> torch.Tensor:
        """Return the write tokens, which begin as the same memory."""
        return lane.memory["tokens"]

    def end_segment(self, piece: RivalPiece, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take what the write tokens became."""
        return {"tokens": hidden_BTD[:, -piece.num_behind :]}


RIVAL = RecurrentMemoryTransformer
