"""Associative recurrent memory transformer, ARMT: every layer has an associative memory that memory tokens write.

Memory tokens, the same learned ones for every segment, follow it. What they are after layer l writes that
layer's memory, which all rows of later segments read in front of the layer:

    x_j <- x_j + A f(W_Q x_j) / (z^T f(W_Q x_j))
    A <- A + sum_i b_i (v_i - A f(k_i) / (z^T f(k_i))) f(k_i)^T,   z <- z + sum_i c_i f(k_i)
    k_i = W_K m_i,  v_i = W_V m_i,  b_i = sigmoid(w_b m_i),  c_i = 1 - z^T f(k_i) / |f(k_i)|^2

f is DPFP. c_i is kept between 0 and 1, and without gradient, as in the authors' code; W_V begins at zero, so that a
pre-trained model reads nothing at first. The parts of the sum are those of one segment at once.

Source: Rodkin, Kuratov, Bulatov, Burtsev: Associative Recurrent Memory Transformer (2024), section 2; DPFP: Schlag,
Irie, Schmidhuber: Linear Transformers Are Secretly Fast Weight Programmers (2021), section 5.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.fam.initial import initial_prompt
from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.linear_memory import LEAST_NORM, retrieve
from transformerfam.rivals.rival import Rival, RivalPiece


def dpfp(rows: torch.Tensor, num_shifts: int) -> torch.Tensor:
    """Return the deterministic parameter-free projection, `(..., 2 * width * num_shifts)`."""
    both = torch.cat((rows, -rows), dim=-1).relu()
    return torch.cat([both * both.roll(shift, dims=-1) for shift in range(1, num_shifts + 1)], dim=-1)


class Armt(Rival):
    """Carry a matrix `2 * association_width * num_feature_shifts x D` and a vector for every layer."""

    names_of_rows = ("tokens",)
    memory_rows_see_each_other = True

    def build(self, model: PreTrainedModel) -> None:
        """Make the memory tokens and every layer's projections."""
        self.tokens = nn.Parameter(initial_prompt(model.get_input_embeddings(), self.config.num_memory_tokens))
        width, layers = self.config.association_width, range(len(self.layouts))
        self.query = nn.ModuleList(self.linear(self.hidden_size, width) for _ in layers)
        self.key = nn.ModuleList(self.linear(self.hidden_size, width) for _ in layers)
        values = [self.linear(self.hidden_size, self.hidden_size) for _ in layers]
        for matrix in values:
            nn.init.zeros_(matrix.weight)
        self.value = nn.ModuleList(values)
        self.share = nn.ModuleList(self.linear(self.hidden_size, 1) for _ in layers)

    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """Return DPFP of keys or queries."""
        return dpfp(rows, self.config.num_feature_shifts)

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return empty memories."""
        num_features = 2 * self.config.association_width * self.config.num_feature_shifts
        memory = {}
        for i in range(len(self.layouts)):
            memory[f"matrix.{i}"] = self.zeros(batch_size, num_features, self.hidden_size)
            memory[f"sums.{i}"] = self.zeros(batch_size, num_features)
        return memory

    def rows_behind(self, lane: Lane) -> torch.Tensor:
        """Return the memory tokens."""
        return self.tokens.expand(len(lane.rows), -1, -1)

    def enter_layer(self, piece: RivalPiece, layer_idx: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Add what every row reads."""
        memory = piece.lane.memory
        features_BTN = self.features(self.query[layer_idx](hidden_BTD))
        return hidden_BTD + retrieve(features_BTN, memory[f"matrix.{layer_idx}"], memory[f"sums.{layer_idx}"])

    def leave_layer(self, piece: RivalPiece, layer_idx: int, hidden_BTD: torch.Tensor) -> None:
        """Write with what the memory tokens became."""
        if not piece.num_behind:
            return
        matrix_BND, sums_BN = (piece.lane.memory[f"{name}.{layer_idx}"] for name in ("matrix", "sums"))
        tokens_BTD = hidden_BTD[:, -piece.num_behind :]
        key_BTN = self.features(self.key[layer_idx](tokens_BTD))
        value_BTD = self.value[layer_idx](tokens_BTD) - retrieve(key_BTN, matrix_BND, sums_BN)
        share_BT1 = self.share[layer_idx](tokens_BTD).sigmoid()
        length_BT1 = key_BTN.pow(2).sum(-1, keepdim=True).clamp(min=LEAST_NORM)
        new_BT1 = (1 - key_BTN @ sums_BN[..., None] / length_BT1).clamp(0, 1).detach()
        piece.updates[f"matrix.{layer_idx}"] = matrix_BND + key_BTN.mT @ (share_BT1 * value_BTD)
        piece.updates[f"sums.{layer_idx}"] = sums_BN + (new_BT1 * key_BTN).sum(1)


RIVAL = Armt
