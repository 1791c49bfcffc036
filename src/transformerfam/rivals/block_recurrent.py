"""Block-recurrent transformer: one layer carries state vectors, with their own projections.

    vertical:    A = self-attention of the tokens + W_v cross-attention(Q_v(e), K(s), V(s))
    horizontal:  h = W_h [attention(Q_s(s), K(s), V(s)) | attention(Q_e(s), K_e, V_e)],   s <- g s + (1 - g) h

e are the tokens of a segment in front of the layer, s the state in front of the segment; K_e and V_e are the layer's
own keys and values, which both directions share, and g = sigmoid(b) is a fixed gate. This is the configuration
"fixed, skip", the best in its paper: the state has no feed-forward layer. State vectors have learned identities, added
after their norm, and positions matter among tokens alone.

Source: Hutchins, Schlag, Wu, Dyer, Neyshabur: Block-Recurrent Transformers (2022), section 3; C.1 of arXiv 2404.09173.
"""

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from transformerfam.errors import UnsupportedModelError
from transformerfam.rivals.rival import Rival, RivalPiece

GATE_MEAN, GATE_STD, STATE_STD = 1.0, 0.1, 0.1
"""Of the random start of gate and state."""


class BlockRecurrent(Rival):
    """Carry `num_memory_tokens` state vectors of one layer."""

    def build(self, model: PreTrainedModel) -> None:
        """Make the state's projections, gate, identities and start."""
        if any(layout.turner.is_in_values for layout in self.layouts):
            raise UnsupportedModelError(
                f"{type(model).__name__} carries latents, and block_recurrent needs the heads' own keys and values"
            )
        num_layers = len(self.layouts)
        chosen = self.config.recurrent_layer
        self.layer_idx = max(0, num_layers * 10 // 12 - 1) if chosen is None else chosen
        if self.layer_idx >= num_layers:
            raise UnsupportedModelError(
                f"recurrent_layer is {self.layer_idx}, the model has layers 0 to {num_layers - 1}"
            )
        layout, width, length = self.layouts[self.layer_idx], self.hidden_size, self.config.num_memory_tokens
        self.head_dim = layout.key_shape[1]
        heads = self.num_heads * self.head_dim
        self.token_query, self.state_query, self.block_query = (self.linear(width, heads) for _ in range(3))
        self.key, self.value = self.linear(width, heads), self.linear(width, heads)
        self.vertical = self.linear(heads, width)
        self.horizontal = self.linear(heads + self.num_heads * layout.value_shape[1], width)
        self.gate = nn.Parameter(GATE_MEAN + GATE_STD * self.normal(width))
        self.identities = nn.Parameter(STATE_STD * self.normal(length, width))
        self.start = nn.Parameter(STATE_STD * self.normal(length, width))

    def normal(self, *shape: int) -> torch.Tensor:
        """Return random numbers of the rival's own generator."""
        return torch.randn(shape, generator=self._draw)

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return the learned start."""
        return {"state": self.start.expand(batch_size, -1, -1)}

    def normed_state(self, piece: RivalPiece) -> torch.Tensor:
        """Return the state over its root mean square, with its identities, `(B, n, D)`."""
        state_BND = piece.lane.memory["state"]
        return rms_norm(state_BND, state_BND.shape[-1:]) + self.identities

    def heads(self, projection: nn.Module, rows_BTD: torch.Tensor) -> torch.Tensor:
        """Return projected rows by heads, `(B, H, T, K)`."""
        return projection(rows_BTD).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def enter_layer(self, piece: RivalPiece, layer_idx: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Keep the input of the layer with the state."""
        if layer_idx == self.layer_idx:
            piece.entered[layer_idx] = hidden_BTD
        return hidden_BTD

    def after_attention(
        self, piece: RivalPiece, layer_idx: int, output_BTD: torch.Tensor, factor: float
    ) -> torch.Tensor:
        """Add what the tokens read of the state."""
        if layer_idx != self.layer_idx:
            return output_BTD
        state_BND = self.normed_state(piece)
        query_BHTK = self.heads(self.token_query, piece.normed_input(layer_idx))
        read = self.attention(query_BHTK, self.heads(self.key, state_BND), self.heads(self.value, state_BND))
        return output_BTD + self.vertical(read)

    def attention(self, query_BHTK: torch.Tensor, key_BHSK: torch.Tensor, value_BHSK: torch.Tensor) -> torch.Tensor:
        """Return the heads' outputs side by side, `(B, T, H * K)`."""
        return scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK).transpose(1, 2).flatten(2)

    def end_segment(self, piece: RivalPiece, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Move the state on by the segment."""
        state_BND = self.normed_state(piece)
        key, value = self.heads(self.key, state_BND), self.heads(self.value, state_BND)
        own = self.attention(self.heads(self.state_query, state_BND), key, value)
        key_e, value_e = (
            rows.repeat_interleave(self.num_heads // rows.shape[1], dim=1) for rows in piece.segment(self.layer_idx)
        )
        of_block = self.attention(self.heads(self.block_query, state_BND), key_e, value_e)
        read = self.horizontal(torch.cat((own, of_block), dim=-1))
        return {"state": torch.lerp(read, piece.lane.memory["state"], self.gate.sigmoid())}


RIVAL = BlockRecurrent
