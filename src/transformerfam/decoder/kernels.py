"""Attention of a piece without the work that a dense mask throws away: the back end `fam` of transformers' attention.

FAM rows see a run of neighbouring keys, all of them. Tokens see all keys in front of the piece, and those of the piece
up to their own. So neither needs a mask: FAM rows are one call; tokens are a full call and a causal call, merged by
their log-sum-exp, or one causal call where FAM rows and tokens are all the keys in sight.

Source: Algorithm 2, the two attentions of a block.
"""

import dataclasses
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.torch_version import TorchVersion
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BACK_END = "fam"
MIXED_BACK_END = "fam_mixed"
"""Of memories that add to what an attention gives."""

CPU_KERNEL_KNOWS_GROUPS = TorchVersion(torch.__version__) >= "2.9"
"""Before torch 2.9 (pytorch/pytorch#157893) torch's flash attention for CPUs took the keys of query head
h from key head h, and read past the end where heads share keys."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the rows of a piece see, where that needs no mask: handed to the layers in the mask's place.

    Attributes:
        num_rows: FAM rows in front of the tokens; each sees the keys from `first_row_key` on.
        first_row_key: index of the first of those keys.
        window: last keys that a token sees, itself included; None is all. Only back ends that know windows take it.
        first_block_key: index of the first key of the block, where the share of the rows' attention that falls on the
            block is wanted: that of the F rows in front, F keys of the FAM lying between the two indices.
        mask: bias on all logits, `(1 or B, 1, num_rows + T, S)`, where a mask is needed.
        query: `(1, H, F, K)` queries used in place of the rows' own.
        queries: where the rows' own queries `(B, H, R, K)` are noted, if anywhere.
        wants_every_weight: whether the weight on every key of the block is wanted, not their sum alone.
    """

    num_rows: int
    first_row_key: int
    window: int | None = None
    first_block_key: int | None = None
    mask: torch.Tensor | None = None
    query: torch.Tensor | None = None
    queries: list[torch.Tensor] | None = None
    wants_every_weight: bool = False


def _full_and_causal(
    query_BHTK: torch.Tensor, key_BGSK: torch.Tensor, value_BGSK: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from T tokens to the keys in front of them, and to their own T causally, on a CPU.

    Returns:
        `(B, H, T, K)`, and the log-sum-exp of all logits `(B, H, T)`.
    """
    (before, sum_before), (own, sum_own) = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BHTK, key_BGSK[:, :, part], value_BGSK[:, :, part], 0.0, is_causal, scale=scaling
        )
        for is_causal, part in enumerate(_in_front_and_own(query_BHTK, key_BGSK))
    )
    output = own.lerp_(before, (sum_before - sum_own).sigmoid_()[..., None].to(own.dtype))
    return output, torch.logaddexp(sum_before, sum_own)


def _in_front_and_own(query_BHTK: torch.Tensor, key_BGSK: torch.Tensor) -> tuple[slice, slice]:
    num_in_front = key_BGSK.shape[2] - query_BHTK.shape[2]
    return slice(0, num_in_front), slice(num_in_front, None)


class _FullAndCausal(torch.autograd.Function):
    """`_full_and_causal` with its gradient.

    The weights over all keys are `exp(S - L)`, so either part's gradients are those of an attention call whose output
    and log-sum-exp `L` are the merged ones.
    """

    @staticmethod
    def forward(
        query_BHTK: torch.Tensor, key_BGSK: torch.Tensor, value_BGSK: torch.Tensor, scaling: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _full_and_causal(query_BHTK, key_BGSK, value_BGSK, scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *tensors, ctx.scaling = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_BHTK: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if grad_BHTK is None:
            return None, None, None, None
        query, key, value, output, log_sum = ctx.saved_tensors
        before, own = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_BHTK,
                query,
                key[:, :, part],
                value[:, :, part],
                output,
                log_sum,
                0.0,
                is_causal,
                scale=ctx.scaling,
            )
            for is_causal, part in enumerate(_in_front_and_own(query, key))
        )
        return before[0] + own[0], torch.cat((before[1], own[1]), 2), torch.cat((before[2], own[2]), 2), None


@torch.compiler.assume_constant_result
def _has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention runs on a device; its causal call ends at the last key, and it knows groups."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.backends.cuda.flash_sdp_enabled() and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend(
    query_BHTK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSK: torch.Tensor,
    is_causal: bool,
    dropout: float,
    scaling: float | None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one run of rows' output, `(B, T, H, K)`; `is_causal` ends at the last key, a mask is `(B, 1, T, S)`."""
    batch, num_heads, num_tokens, key_width = query_BHTK.shape
    groups, num_keys, width = value_BGSK.shape[1:]
    if width < key_width:  # latent attention; the kernels below want one width
        value_BGSK = torch.nn.functional.pad(value_BGSK, (0, key_width - width))
        return _attend(query_BHTK, key_BGSK, value_BGSK, is_causal, dropout, scaling, mask)[..., :width]
    is_causal = is_causal and num_tokens > 1
    if num_tokens == 1 and groups < num_heads:  # the heads of a group share keys: they are rows of one call
        query_BHTK = query_BHTK.view(batch, groups, num_heads // groups, -1)
    if is_causal and num_tokens < num_keys:
        if query_BHTK.device.type == "cpu" and dropout == 0:
            if groups < num_heads and not CPU_KERNEL_KNOWS_GROUPS:
                key_BGSK, value_BGSK = (t.repeat_interleave(num_heads // groups, 1) for t in (key_BGSK, value_BGSK))
            if torch.is_grad_enabled():
                return _FullAndCausal.apply(query_BHTK, key_BGSK, value_BGSK, scaling)[0].transpose(1, 2)
            return _full_and_causal(query_BHTK, key_BGSK, value_BGSK, scaling)[0].transpose(1, 2)
        is_half, width = query_BHTK.dtype in (torch.float16, torch.bfloat16), query_BHTK.shape[-1]
        if is_half and width % 8 == 0 and width <= 256 and _has_flash(query_BHTK.device):
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query_BHTK, key_BGSK, value_BGSK, dropout, True, scale=scaling)[0].transpose(1, 2)
        mask = query_BHTK.new_ones(num_tokens, num_keys, dtype=torch.bool).tril(num_keys - num_tokens)
        is_causal = False
    output = scaled_dot_product_attention(
        query_BHTK,
        key_BGSK,
        value_BGSK,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query_BHTK.shape[1] > groups,
    )
    return output.reshape(batch, num_heads, num_tokens, -1).transpose(1, 2)


def attend_rows(
    query_BHRK: torch.Tensor,
    key_BGSK: torch.Tensor,
    value_BGSK: torch.Tensor,
    sight: Sight,
    dropout: float = 0.0,
    scaling: float | None = None,
    soft_cap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from FAM rows, and give what of their attention falls on the block; softmax in float32.

    Args:
        query_BHRK: of all rows in front of the tokens; the first F rows query.
        key_BGSK: all keys in sight.
        value_BGSK: likewise.
        sight: with `first_block_key`.
        dropout: probability that an attention weight is dropped; the share is that in front of it.
        scaling: factor on the logits.
        soft_cap: largest logit, taken by tanh.
        sinks_H: further logits of every head, whose value is zero.

    Returns:
        `(B, R, H, K)`, zeros for rows that do not query, and shares `(B, H, F)`, or weights on the block's keys
        `(B, H, F, T)`.

    Source: the gate is ours; see `FamConfig.fam_update`.
    """
    assert sight.first_block_key is not None
    seen = slice(sight.first_row_key, None)
    num_asking, groups = sight.first_block_key - sight.first_row_key, key_BGSK.shape[1]
    exact = torch.promote_types(query_BHRK.dtype, torch.float32)
    with torch.autocast(query_BHRK.device.type, enabled=False):
        # The heads of a group share keys: they are rows of one product.
        query_BGNK = query_BHRK[:, :, :num_asking].unflatten(1, (groups, -1)).flatten(2, 3).to(exact)
        logits = (query_BGNK @ key_BGSK[:, :, seen].to(exact).mT).unflatten(2, (-1, num_asking))
        logits = logits * (query_BHRK.shape[-1] ** -0.5 if scaling is None else scaling)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if sight.mask is not None:
            logits = logits + sight.mask[:, :, None, :num_asking, seen].to(exact)
        if sinks_H is not None:
            sinks = sinks_H.to(exact).view(1, groups, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat((logits, sinks), dim=-1)
        weights = logits.softmax(-1)
        if sinks_H is not None:
            weights = weights[..., :-1]
        on_block = weights[..., num_asking:]
        if not sight.wants_every_weight:
            on_block = on_block.sum(-1)
        weights = torch.nn.functional.dropout(weights, dropout)
        output = weights.flatten(2, 3).to(value_BGSK.dtype) @ value_BGSK[:, :, seen]
        output = output.unflatten(2, (-1, num_asking)).flatten(1, 2).transpose(1, 2)
    if num_asking < query_BHRK.shape[2]:
        output = torch.nn.functional.pad(output, (0, 0, 0, 0, 0, query_BHRK.shape[2] - num_asking))
    return output.contiguous(), on_block.flatten(1, 2)


def asking_rows(query_BHTK: torch.Tensor, sight: Sight) -> torch.Tensor:
    """Return the queries of the rows in front of the tokens, `(B, H, R, K)`."""
    if sight.queries is not None:
        sight.queries.append(query_BHTK[:, :, : sight.num_rows])
    if sight.query is None:
        return query_BHTK[:, :, : sight.num_rows]
    return sight.query.to(query_BHTK).expand(len(query_BHTK), -1, -1, -1)


def attend_piece(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "Sight | torch.Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend from FAM rows and tokens, in transformers' attention interface.

    Args:
        module: the attention layer.
        query: `(B, H, R + T, K)`, FAM rows first.
        key: `(B, G, S, K)` all keys in sight; those of the tokens are the last T.
        value: `(B, G, S, K)`.
        attention_mask: a `Sight`, or the mask of a single token; another mask, or None for a causal one, is passed on
            to transformers' `sdpa`.
        dropout: probability that an attention weight is dropped.
        scaling: factor on the logits.
        **kwargs: passed on to transformers' `sdpa`.

    Returns:
        `(B, R + T, H, K)`; for the weights None, or those that the `Sight` wants, see `attend_rows`.
    """
    if torch.is_autocast_enabled(query.device.type):  # which knows torch's attention, and not the kernels in it
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attention_mask, torch.Tensor) and query.shape[2] == 1:
        return _attend(query, key, value, False, dropout, scaling, attention_mask), None
    if not isinstance(attention_mask, Sight):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    num_rows, first = attention_mask.num_rows, attention_mask.first_row_key
    if not num_rows:
        return _attend(query, key, value, True, dropout, scaling), None
    asking, share = asking_rows(query, attention_mask), None
    if attention_mask.first_block_key is not None:
        rows, share = attend_rows(asking, key, value, attention_mask, dropout, scaling)
    elif attention_mask.mask is not None:
        mask = attention_mask.mask[:, :, :num_rows]
        rows = sdpa_attention_forward(module, asking, key, value, mask, dropout, scaling, **kwargs)[0]
    else:
        rows = _attend(asking, key[:, :, first:], value[:, :, first:], False, dropout, scaling)
    if query.shape[2] == num_rows:
        return rows, share
    if attention_mask.mask is not None:
        tokens = query[:, :, num_rows:], key, value, attention_mask.mask[:, :, num_rows:]
        return torch.cat((rows, sdpa_attention_forward(module, *tokens, dropout, scaling, **kwargs)[0]), dim=1), share
    if query.shape[2] != key.shape[2]:
        return torch.cat((rows, _attend(query[:, :, num_rows:], key, value, True, dropout, scaling)), dim=1), share
    output = _attend(query, key, value, True, dropout, scaling)  # causal for the FAM rows too: theirs is replaced
    if output.requires_grad:
        return torch.cat((rows, output[:, num_rows:]), dim=1), share
    output[:, :num_rows] = rows
    return output, share


AttentionInterface.register(BACK_END, attend_piece)
AttentionMaskInterface.register(BACK_END, sdpa_mask)
