"""A gated linear-attention memory: next to local attention, every head reads a state whose decay follows the text.

    S_t = diag(a_t) S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K),   a_t = sigmoid(W_2 W_1 x_t + b)^(1 / 16)

q, k and v are the layer's own, without positions; a_t is made from the layer's input, one number for every dimension of
a key/value head. o_t, over its root mean square, is mixed with local attention by one gate per head. Chunks of tokens
are computed at once; between them runs the recurrence.

Source: Yang, Wang, Shen, Panda, Kim: Gated Linear Attention Transformers (2023), sections 4.1 to 4.3.
"""

import math

import torch
from torch import nn
from torch.nn.functional import logsigmoid, rms_norm
from transformers import PreTrainedModel

from transformerfam.rivals.mixing import require_plain_heads
from transformerfam.rivals.rival import Rival, RivalPiece

CHUNK_LENGTH = 8


def gated_linear_attention(
    query_BGRTK: torch.Tensor,
    key_BGTK: torch.Tensor,
    value_BGTV: torch.Tensor,
    log_decay_BGTK: torch.Tensor,
    state_BGKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence over tokens, chunk by chunk.

    Args:
        query_BGRTK: scaled queries, R for every key/value head.
        key_BGTK: keys.
        value_BGTV: values.
        log_decay_BGTK: logarithms of the decays, at most 0.
        state_BGKV: what was there before.

    Returns:
        What every token reads `(B, G, R, T, V)`, and the state after the last.

    Source: section 4.2, the chunkwise form; the decays of a chunk are kept as differences, which never overflow.
    """
    outputs = []
    chunks = zip(
        query_BGRTK.split(CHUNK_LENGTH, dim=3),
        *(t.split(CHUNK_LENGTH, dim=2) for t in (key_BGTK, value_BGTV, log_decay_BGTK)),
        strict=True,
    )
    for query, key, value, log_decay in chunks:
        total = log_decay.cumsum(2)
        length = key.shape[2]
        is_past = torch.ones(length, length, dtype=torch.bool, device=key.device).tril()[..., None]
        between = (total[:, :, :, None] - total[:, :, None]).masked_fill(~is_past, -torch.inf).exp()
        weights = (query.transpose(2, 3) @ (key[:, :, None] * between).mT).transpose(2, 3)
        before = (query * total.exp()[:, :, None]) @ state_BGKV[:, :, None]
        outputs.append(before + weights @ value[:, :, None])
        last = total[:, :, -1:]
        state_BGKV = last.exp().mT * state_BGKV + (key * (last - total).exp()).mT @ value
    return torch.cat(outputs, dim=3), state_BGKV


class GatedLinear(Rival):
    """Carry a matrix `K x K` for every key/value head of every layer."""

    mixes = True

    def build(self, model: PreTrainedModel) -> None:
        """Make the projections of the decays, and the gates."""
        require_plain_heads(self, model)
        gate, rank = self.config.initial_gate, self.config.decay_rank
        widths = [heads * width for heads, width in (layout.key_shape for layout in self.layouts)]
        self.down = nn.ModuleList(self.linear(self.hidden_size, rank) for _ in widths)
        self.up = nn.ModuleList(self.linear(rank, width) for width in widths)
        self.bias = nn.ParameterList(torch.zeros(width) for width in widths)
        self.gates = nn.Parameter(torch.full((len(widths), self.num_heads), math.log(gate / (1 - gate))))

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return empty states."""
        return {
            f"state.{i}": self.zeros(batch_size, *layout.key_shape, layout.value_shape[1])
            for i, layout in enumerate(self.layouts)
        }

    def enter_layer(self, piece: RivalPiece, layer_idx: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Keep the layer's input, of which the decays are made."""
        piece.entered[layer_idx] = hidden_BTD
        return hidden_BTD

    def log_decay(self, layer_idx: int, input_BTD: torch.Tensor) -> torch.Tensor:
        """Return the logarithms of the decays, `(B, G, T, K)`."""
        heads, width = self.layouts[layer_idx].key_shape
        logits_BTN = self.up[layer_idx](self.down[layer_idx](input_BTD)) + self.bias[layer_idx]
        return (logsigmoid(logits_BTN) / self.config.decay_temperature).unflatten(2, (heads, width)).transpose(1, 2)

    def mix(
        self, piece: RivalPiece, layer_idx: int, query_BHTK: torch.Tensor, output_BTHK: torch.Tensor
    ) -> torch.Tensor:
        """Run the recurrence over the piece, and mix what it reads with local attention."""
        state_BGKV = piece.lane.memory[f"state.{layer_idx}"]
        key_BGTK, value_BGTV = piece.own[layer_idx]
        query_BHTK = piece.unturned(layer_idx, query_BHTK, piece.start)
        query_BGRTK = query_BHTK.unflatten(1, (key_BGTK.shape[1], -1)) * query_BHTK.shape[-1] ** -0.5
        read_BGRTV, piece.updates[f"state.{layer_idx}"] = gated_linear_attention(
            query_BGRTK,
            piece.unturned(layer_idx, key_BGTK, piece.start),
            value_BGTV,
            self.log_decay(layer_idx, piece.normed_input(layer_idx)),
            state_BGKV,
        )
        read_BTHK = rms_norm(read_BGRTV, read_BGRTV.shape[-1:], eps=1e-5).flatten(1, 2).transpose(1, 2)
        return torch.lerp(output_BTHK, read_BTHK, self.gates[layer_idx].sigmoid()[:, None])


RIVAL = GatedLinear
