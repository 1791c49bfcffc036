"""Attention of a piece without the work that a dense mask throws away: the back end `fam` of transformers' attention.

FAM rows see a run of neighbouring keys, all of them. Tokens see all keys in front of them, the last token all there
are. So neither needs a mask over the whole piece: FAM rows are one call without a mask, tokens are calls for a few
rows each that stop at the last key these rows see.

Source: Algorithm 2, the two attentions of a block.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BACK_END = "fam"
ROWS_PER_CALL = 128
"""Tokens per attention call: half of so many keys are computed in vain, per token."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the rows of a piece see, where that needs no mask: handed to the layers in the mask's place.

    Attributes:
        num_rows: FAM rows in front of the tokens; each sees the keys from `first_row_key` on.
        first_row_key: index of the first of those keys.
    """

    num_rows: int
    first_row_key: int


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def _causal_tail(num_tokens: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the bias of the last `num_tokens` of `num_keys` tokens on all of them."""
    shut = torch.full((num_tokens, num_keys), torch.finfo(dtype).min, dtype=dtype, device=device)
    return shut.triu(num_keys - num_tokens + 1)


def _causal_bias(num_tokens: int, num_keys: int, like: torch.Tensor) -> torch.Tensor | None:
    """Return the bias of the last `num_tokens` of `num_keys` tokens, `(1, 1, num_tokens, num_keys)`; None for one."""
    if num_tokens == 1:
        return None
    rounded = -(-num_keys // 1024) * 1024  # so that one tensor serves calls of any length
    tail = _causal_tail(ROWS_PER_CALL, rounded, like.dtype, like.device)
    return tail[None, None, ROWS_PER_CALL - num_tokens :, rounded - num_keys :]


def _attend(
    query_BHTK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSK: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Return one attention call's output, `(B, T, H, K)`."""
    batch, num_heads, num_tokens, _ = query_BHTK.shape
    groups = key_BGSK.shape[1]
    if num_tokens == 1 and groups < num_heads:  # the heads of a group share keys: they are rows of one call
        query_BHTK = query_BHTK.view(batch, groups, num_heads // groups, -1)
    grouped = query_BHTK.shape[1] > groups
    if grouped and query_BHTK.device.type != "cpu" and bias is not None:
        # Elsewhere no fused kernel takes both a mask and fewer key heads than query heads.
        key_BGSK, value_BGSK = (repeat_kv(t, num_heads // groups) for t in (key_BGSK, value_BGSK))
        grouped = False
    output = scaled_dot_product_attention(
        query_BHTK, key_BGSK, value_BGSK, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return output.reshape(batch, num_heads, num_tokens, -1).transpose(1, 2)


def attend_piece(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "Sight | torch.Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from FAM rows and tokens, in transformers' attention interface.

    Args:
        module: the attention layer.
        query: `(B, H, R + T, K)`, FAM rows first.
        key: `(B, G, S, K)` all keys in sight; those of the tokens are the last T.
        value: `(B, G, S, K)`.
        attention_mask: a `Sight`; a mask, or None for a causal one, goes on to transformers' `sdpa`.
        dropout: probability that an attention weight is dropped.
        scaling: factor on the logits.
        **kwargs: go on to transformers' `sdpa`.

    Returns:
        `(B, R + T, H, K)`, and None for the weights.
    """
    if not isinstance(attention_mask, Sight):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    num_rows, num_keys = attention_mask.num_rows, key.shape[2]
    parts = []
    if num_rows:
        seen = slice(attention_mask.first_row_key, num_keys)
        parts.append(_attend(query[:, :, :num_rows], key[:, :, seen], value[:, :, seen], None, dropout, scaling))
    tokens = query[:, :, num_rows:]
    before = num_keys - tokens.shape[2]
    for start in range(0, tokens.shape[2], ROWS_PER_CALL):
        stop = min(start + ROWS_PER_CALL, tokens.shape[2])
        seen = slice(0, before + stop)
        bias = _causal_bias(stop - start, before + stop, query)
        parts.append(_attend(tokens[:, :, start:stop], key[:, :, seen], value[:, :, seen], bias, dropout, scaling))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


AttentionInterface.register(BACK_END, attend_piece)
AttentionMaskInterface.register(BACK_END, sdpa_mask)
