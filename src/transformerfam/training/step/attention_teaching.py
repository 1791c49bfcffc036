"""The outputs of attention as full attention gives them: what tokens should have read from the FAM, layer by layer."""

from dataclasses import replace
from typing import Any

import torch

from transformerfam.decoder.state import ReadingState
from transformerfam.tasks.batch import Batch
from transformerfam.training.step.attention_outputs import AttentionOutputs
from transformerfam.training.step.parts import Block, StepPart
from transformerfam.training.step.scores import StepOutput


class AttentionTeaching(StepPart):
    """Add the distance of attention's outputs from those that full attention gives.

    Per token it is the squared length of the difference, relative to the mean squared length of the teacher's outputs
    of that layer, averaged over layers and weighed as the token's prediction is.
    """

    def __init__(self, outputs: AttentionOutputs, attention_LND: torch.Tensor, batch: Batch, weight: float) -> None:
        """Compare the outputs of a batch.

        Args:
            outputs: what notes them.
            attention_LND: the teacher's, at the batch's tokens of a weight above 0.
            batch: the batch.
            weight: by which the distance enters the loss.
        """
        self.outputs, self.weight = outputs, weight
        self.theirs_LND = attention_LND
        self.scale_L = attention_LND.float().pow(2).sum(-1).mean(-1).clamp(min=1e-12)
        self.rows_N, self.columns_N = (batch.weights_BT > 0).nonzero(as_tuple=True)
        self.weights_N = batch.weights_BT[self.rows_N, self.columns_N]

    def note(self, state: ReadingState, batch: Batch, block: Block) -> Block:
        """Return which block is read."""
        return block

    def begin(self) -> None:
        """Note the outputs of a block, for the first time or again."""
        self.outputs.begin()

    def within(self, before: ReadingState, after: ReadingState, hidden_BTD: torch.Tensor, note: Block) -> torch.Tensor:
        """Return the distance of the block's tokens."""
        noted = self.outputs.end()
        # With `gradient_tokens` a block's first tokens are read before it begins here.
        first = note.stop - hidden_BTD.shape[1]
        here = ((self.columns_N >= first) & (self.columns_N < note.stop)).nonzero()[:, 0]
        if not len(here):
            return hidden_BTD.new_zeros(())
        rows, columns = self.rows_N[here], self.columns_N[here] - first
        weights_K = self.weights_N[here].to(hidden_BTD.device)
        distances = []
        for layer_idx, output_BTD in noted.items():
            away_KD = output_BTD[rows, columns].float() - self.theirs_LND[layer_idx, here].float()
            distances.append((away_KD.pow(2).sum(-1) * weights_K).sum() / self.scale_L[layer_idx])
        return torch.stack(distances).mean()

    def finish(self, output: StepOutput, given: list[torch.Tensor], notes: list[Any]) -> StepOutput:
        """Add the sum over the blocks."""
        distance = torch.stack(given).sum()
        loss = output.loss + self.weight * distance
        return replace(output, loss=loss, attention_distance=distance.detach())
