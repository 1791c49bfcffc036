"""One Llama-like decoder layer as plain functions over plain tensors: the parts that `reference.py` puts together.

Keys are kept without rotation, with their absolute position, and are rotated when a query sees them.

Shape suffixes: T tokens (or FAM rows), D hidden, H query heads, G key/value heads, K head dim, V vocabulary; N is the
number of keys that one query sees, I the width of the feed-forward layer.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from transformerfam.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Hold one decoder layer's tensors; each matrix has the shape (output, input)."""

    attention_norm_D: Tensor
    query_HKxD: Tensor
    key_GKxD: Tensor
    value_GKxD: Tensor
    output_DxHK: Tensor
    feed_forward_norm_D: Tensor
    gate_IxD: Tensor
    up_IxD: Tensor
    down_DxI: Tensor


@dataclass(frozen=True, kw_only=True)
class ReferenceWeights:
    """Hold a Llama-like decoder as plain tensors."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: Tensor
    output_embedding_VD: Tensor
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_epsilon: float
    inverse_frequencies: Tensor
    """Radians per position of each pair of a head's dimensions, (head_dim / 2,), float64."""
    rope_scaling: float = 1.0
    lora_of_rows: "ReferenceWeights | None" = None
    """The weights with LoRA added, where it acts on FAM rows alone."""

    @property
    def rows(self) -> "ReferenceWeights":
        """Return the weights that FAM rows go through."""
        return self.lora_of_rows or self

    @classmethod
    def from_llama(cls, model: "LlamaForCausalLM") -> "ReferenceWeights":
        """View the parameters of `model`, so that a backward pass through the reference fills their gradients.

        Raises:
            UnsupportedModelError: the model has biases or another activation than SiLU.
        """
        config = model.config
        if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
            raise UnsupportedModelError(
                f"the reference is a Llama without biases and with silu; the model has attention_bias "
                f"{config.attention_bias}, mlp_bias {config.mlp_bias}, hidden_act {config.hidden_act!r}; "
                "use a model without them"
            )
        decoder: Any = model.model
        layers = tuple(
            LayerWeights(
                attention_norm_D=layer.input_layernorm.weight,
                query_HKxD=layer.self_attn.q_proj.weight,
                key_GKxD=layer.self_attn.k_proj.weight,
                value_GKxD=layer.self_attn.v_proj.weight,
                output_DxHK=layer.self_attn.o_proj.weight,
                feed_forward_norm_D=layer.post_attention_layernorm.weight,
                gate_IxD=layer.mlp.gate_proj.weight,
                up_IxD=layer.mlp.up_proj.weight,
                down_DxI=layer.mlp.down_proj.weight,
            )
            for layer in decoder.layers
        )
        head_dim = layers[0].query_HKxD.shape[0] // config.num_attention_heads
        rotary = decoder.rotary_emb
        return cls(
            embedding_VD=decoder.embed_tokens.weight,
            layers=layers,
            final_norm_D=decoder.norm.weight,
            output_embedding_VD=model.lm_head.weight,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=layers[0].key_GKxD.shape[0] // head_dim,
            head_dim=head_dim,
            norm_epsilon=config.rms_norm_eps,
            inverse_frequencies=rotary.inv_freq.to(torch.float64),
            rope_scaling=float(rotary.attention_scaling),
        )

    def to(self, dtype: torch.dtype) -> "ReferenceWeights":
        """Return the weights in `dtype`; gradients still reach the originals."""
        layers = tuple(
            LayerWeights(**{item.name: getattr(layer, item.name).to(dtype) for item in dataclasses.fields(layer)})
            for layer in self.layers
        )
        return dataclasses.replace(
            self,
            embedding_VD=self.embedding_VD.to(dtype),
            layers=layers,
            final_norm_D=self.final_norm_D.to(dtype),
            output_embedding_VD=self.output_embedding_VD.to(dtype),
            lora_of_rows=self.lora_of_rows and self.lora_of_rows.to(dtype),
        )


@dataclass(frozen=True)
class SeenKey:
    """Hold one key and value of one layer, not rotated, and its position."""

    key_GK: Tensor
    value_GK: Tensor
    position: float
    bias: float = 0.0
    is_in_window: bool = True
    """Whether Transformer-XL's window can hide it: tokens of the memory segments and of the block."""


def make_keys(
    weights: ReferenceWeights, layer: LayerWeights, input_TD: Tensor, positions: list[float]
) -> list[SeenKey]:
    """Make the keys and values of a layer's input rows, one per position."""
    normed_TD = norm(weights, input_TD, layer.attention_norm_D)
    heads = (len(positions), weights.num_key_value_heads, weights.head_dim)
    key_TGK = (normed_TD @ layer.key_GKxD.T).view(heads)
    value_TGK = (normed_TD @ layer.value_GKxD.T).view(heads)
    return [SeenKey(*row) for row in zip(key_TGK, value_TGK, positions, strict=True)]


def make_queries(weights: ReferenceWeights, layer: LayerWeights, input_TD: Tensor) -> Tensor:
    """Make the queries of a layer's input rows, (T, H, K), not rotated."""
    normed_TD = norm(weights, input_TD, layer.attention_norm_D)
    return (normed_TD @ layer.query_HKxD.T).view(len(input_TD), weights.num_attention_heads, weights.head_dim)


def attend(weights: ReferenceWeights, query_HK: Tensor, position: float, seen: list[SeenKey]) -> Tensor:
    """Let one query attend to the keys that it sees.

    Returns:
        (H * K,) mixed values of all heads, before the output projection.
    """
    value_NGK = torch.stack([key.value_GK for key in seen])
    value_NHK = value_NGK.repeat_interleave(weights.num_attention_heads // weights.num_key_value_heads, dim=1)
    return torch.einsum("hn,nhk->hk", attention_shares(weights, query_HK, position, seen), value_NHK).flatten()


def attention_shares(weights: ReferenceWeights, query_HK: Tensor, position: float, seen: list[SeenKey]) -> Tensor:
    """Give the shares of one query's attention that fall on the keys that it sees: one softmax over all of them.

    Returns:
        (H, N), one per head and key.
    """
    key_NGK = rotate(weights, torch.stack([key.key_GK for key in seen]), [key.position for key in seen])
    bias_N = query_HK.new_tensor([key.bias for key in seen])
    query_HK = rotate(weights, query_HK[None], [position])[0]
    key_NHK = key_NGK.repeat_interleave(weights.num_attention_heads // weights.num_key_value_heads, dim=1)
    logits_HN = torch.einsum("hk,nhk->hn", query_HK, key_NHK) / weights.head_dim**0.5 + bias_N
    return logits_HN.softmax(dim=-1)


def rotate(weights: ReferenceWeights, rows_NHK: Tensor, positions: list[float]) -> Tensor:
    """Turn each row to its position, dimension k together with dimension k + K / 2.

    The angles are taken in float64, so that positions of many millions keep all their digits.
    """
    position_N = torch.tensor(positions, dtype=torch.float64, device=rows_NHK.device)
    angles_N1K = (position_N[:, None] * weights.inverse_frequencies)[:, None, :]
    cos = (angles_N1K.cos() * weights.rope_scaling).to(rows_NHK.dtype)
    sin = (angles_N1K.sin() * weights.rope_scaling).to(rows_NHK.dtype)
    first, second = rows_NHK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm(weights: ReferenceWeights, rows_TD: Tensor, scale_D: Tensor) -> Tensor:
    """Divide each row by its root mean square and scale it."""
    mean_square_T1 = rows_TD.pow(2).mean(dim=-1, keepdim=True)
    return scale_D * rows_TD * torch.rsqrt(mean_square_T1 + weights.norm_epsilon)


def feed_forward(weights: ReferenceWeights, layer: LayerWeights, rows_TD: Tensor) -> Tensor:
    """Run norm and gated feed-forward, without the residual."""
    normed_TD = norm(weights, rows_TD, layer.feed_forward_norm_D)
    return (silu(normed_TD @ layer.gate_IxD.T) * (normed_TD @ layer.up_IxD.T)) @ layer.down_DxI.T
