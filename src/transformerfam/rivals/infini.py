"""Infini-attention: next to local attention, every head reads a compressive memory of past segments.

    A_mem = s(Q) M / (s(Q) z),   A = g A_mem + (1 - g) A_dot,   s = ELU + 1
    M <- M + s(K)^T (V - s(K) M / (s(K) z)),   z <- z + sum s(K)

M and z are written after a segment with its own keys and values, and read with the queries of later ones, all without
positions; g is one gate per head. Without the delta rule V is written as it is.

Source: Munkhdalai, Faruqui, Gopal: Leave No Context Behind (2024), section 2.1; C.1 of arXiv 2404.09173.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.rivals.linear_memory import retrieve
from transformerfam.rivals.mixing import require_plain_heads
from transformerfam.rivals.rival import Rival, RivalPiece


def features(rows: torch.Tensor) -> torch.Tensor:
    """Return ELU + 1."""
    return nn.functional.elu(rows) + 1


class InfiniAttention(Rival):
    """Carry a matrix `K x K` and a vector `K` for every key/value head of every layer."""

    mixes = True

    def build(self, model: PreTrainedModel) -> None:
        """Make the gates."""
        require_plain_heads(self, model)
        gate = self.config.initial_gate
        self.gates = nn.Parameter(torch.full((len(self.layouts), self.num_heads), math.log(gate / (1 - gate))))

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return empty memories."""
        memory = {}
        for i, layout in enumerate(self.layouts):
            heads, width = layout.key_shape
            memory[f"matrix.{i}"] = self.zeros(batch_size, heads, width, layout.value_shape[1])
            memory[f"sums.{i}"] = self.zeros(batch_size, heads, width)
        return memory

    def mix(
        self, piece: RivalPiece, layer_idx: int, query_BHTK: torch.Tensor, output_BTHK: torch.Tensor
    ) -> torch.Tensor:
        """Mix what the memory gives with local attention."""
        memory_BGKV, sums_BGK = (piece.lane.memory[f"{name}.{layer_idx}"] for name in ("matrix", "sums"))
        query_BHTK = features(piece.unturned(layer_idx, query_BHTK, piece.start))
        grouped = query_BHTK.unflatten(1, (memory_BGKV.shape[1], -1)).flatten(2, 3)
        read_BTHK = retrieve(grouped, memory_BGKV, sums_BGK).reshape(*query_BHTK.shape[:3], -1).transpose(1, 2)
        return torch.lerp(output_BTHK, read_BTHK, self.gates[layer_idx].sigmoid()[:, None])

    def end_segment(self, piece: RivalPiece, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Write the segment's keys and values."""
        updates = {}
        for i in range(len(self.layouts)):
            memory_BGKV, sums_BGK = piece.lane.memory[f"matrix.{i}"], piece.lane.memory[f"sums.{i}"]
            key_BGTK, value_BGTV = piece.segment(i)
            key_BGTK = features(key_BGTK)
            if self.config.use_delta_rule:
                value_BGTV = value_BGTV - retrieve(key_BGTK, memory_BGKV, sums_BGK)
            updates[f"matrix.{i}"] = memory_BGKV + key_BGTK.mT @ value_BGTV
            updates[f"sums.{i}"] = sums_BGK + key_BGTK.sum(2)
        return updates


RIVAL = InfiniAttention
