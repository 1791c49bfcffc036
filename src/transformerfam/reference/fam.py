"""Algorithms 1 and 2 of the paper and every choice of `FamConfig`, as plain loops over plain tensors.

Slow, readable and written from the paper, not from the fast path: this is what the fast path is compared with. One
sequence at a time, block by block, layer by layer, query by query. Every query has a plain list of the keys that it
sees.

Shape suffixes: T tokens, D hidden, H query heads, K head dim, F FAM rows, L layers, V vocabulary.

Source: sections 2.1, 2.2, B.1, B.2, B.4 and C.3 of arXiv 2404.09173.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.errors import TransformerFamError
from transformerfam.reference.layer import (
    LayerWeights,
    ReferenceWeights,
    SeenKey,
    attend,
    attention_shares,
    feed_forward,
    make_keys,
    make_queries,
    norm,
)

__all__ = ["ReferenceResult", "ReferenceWeights", "fam_positions", "run_reference"]


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """Hold what the reference computed; every tensor carries its graph."""

    logits: Tensor
    """Next-token logits, (T, V)."""
    hidden: Tensor
    """Hidden states after the final norm, (T, D)."""
    fams: list[Tensor]
    """FAM of all layers, (L, F, D) each: the initial one, then one per complete block; zeros where a layer has none.
    With `fam_feeds="slots"` (L, F, 2 G K): every head's key, not rotated, then every head's value."""


@dataclass
class LayerMemory:
    """Hold what one layer carries from block to block."""

    initial_fam_FD: Tensor
    """What the model starts from, whether or not the sequence started from a saved FAM."""
    fam_FD: Tensor
    starts_from_saved_fam: bool
    fam_keys: list[list[SeenKey]] = field(default_factory=list)
    """Keys of the FAMs so far, the initial one first."""
    block_keys: list[list[SeenKey]] = field(default_factory=list)
    """Keys of the complete blocks so far."""


def fam_positions(config: FamConfig, block_start: int) -> tuple[list[float], list[float]]:
    """Give the positions of the FAM that is read in the block whose first token is at `block_start`.

    Returns:
        (key positions, query positions), one per FAM row. A FAM's key is where the block before wrote it; its
        query is there too, or where the result of this block will be.

    Source: section B.2.1.
    """

    def written_before(start: int) -> list[float]:
        rows = range(config.fam_length)
        if config.fam_position == "last":
            return [float(start - config.fam_length + row) for row in rows]
        if config.fam_position == "fractional":
            return [start - 1 + (row + 1) / (config.fam_length + 1) for row in rows]
        return [0.0 for _ in rows]

    key_positions = written_before(block_start)
    if config.fam_query_position == "written":
        return key_positions, key_positions
    return key_positions, written_before(block_start + config.block_size)


def run_reference(
    weights: ReferenceWeights,
    config: FamConfig,
    input_ids: Tensor,
    *,
    initial: Tensor | None = None,
    position_offset: int = 0,
    saved_fam: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> ReferenceResult:
    """Read one sequence with block sliding window attention and feedback attention memory.

    Args:
        weights: the decoder.
        config: every choice; `fam_dtype` is ignored, since the FAM is kept in `dtype`.
        input_ids: (T,) token ids.
        initial: the learnable start: a prompt (F, D), or with `fam_init="prefix"` rows per layer (L, F, D). None only
            with `fam_length` 0.
        position_offset: position of the first token.
        saved_fam: (L, F, D) FAM of another reading to start from instead of the initial one.
        dtype: type of all computation; the weights' own when None.

    Raises:
        TransformerFamError: `input_ids`, `initial` or `saved_fam` has another shape than required.
    """
    weights = weights if dtype is None else weights.to(dtype)
    _check_shapes(weights, config, input_ids, initial, saved_fam)
    initial_fam_LFD = _initial_fam(weights.rows, config, initial, position_offset)
    started_LFD = initial_fam_LFD
    if config.has_slots:
        started_LFD = torch.stack(
            [_slots(weights.rows, *pair) for pair in zip(weights.rows.layers, initial_fam_LFD, strict=True)]
        )
    first_fam_LFD = started_LFD if saved_fam is None else saved_fam.to(initial_fam_LFD.dtype)
    memories = [
        LayerMemory(
            initial_fam_FD=initial_fam_LFD[layer_idx],
            fam_FD=first_fam_LFD[layer_idx],
            starts_from_saved_fam=saved_fam is not None,
        )
        for layer_idx in range(len(weights.layers))
    ]
    fams = [_stack_fams(config, memories)]
    hidden_blocks = []
    for start in range(0, len(input_ids), config.block_size):
        block_ids = input_ids[start : start + config.block_size]
        hidden_TD = weights.embedding_VD[block_ids]
        rows_FD: Tensor | None = None  # what the layer below made of its FAM
        for layer_idx, memory in enumerate(memories):
            hidden_TD, rows_FD = _run_block(
                weights, config, layer_idx, hidden_TD, rows_FD, memory, position_offset + start
            )
        hidden_blocks.append(hidden_TD)
        if len(block_ids) == config.block_size:
            fams.append(_stack_fams(config, memories))
    hidden = norm(weights, torch.cat(hidden_blocks), weights.final_norm_D)
    return ReferenceResult(logits=hidden @ weights.output_embedding_VD.T, hidden=hidden, fams=fams)


def _run_block(
    weights: ReferenceWeights,
    config: FamConfig,
    layer_idx: int,
    block_TD: Tensor,
    below_FD: Tensor | None,
    memory: LayerMemory,
    block_start: int,
) -> tuple[Tensor, Tensor | None]:
    """Run one layer over one block, complete or not, and move its memory on when the block is complete.

    Args:
        weights: the decoder.
        config: every choice.
        layer_idx: number of the layer.
        block_TD: the layer's input.
        below_FD: what comes up from the FAM of the layers below; None below the lowest FAM, and in part of a block.
        memory: what the layer carries.
        block_start: position of the block's first token.

    Returns:
        The layer's output, (T, D), and what goes up to the FAM of the layers above, (F, D) or None.
    """
    layer, fam_layer = weights.layers[layer_idx], weights.rows.layers[layer_idx]
    has_fam = config.carries_fam(layer_idx)
    fam_key_positions, fam_query_positions = fam_positions(config, block_start)
    if has_fam and config.has_slots:
        memory.fam_keys.append(_slot_keys(weights, memory.fam_FD, fam_key_positions))
    elif has_fam:
        memory.fam_keys.append(make_keys(weights.rows, fam_layer, memory.fam_FD, fam_key_positions))

    token_positions = [float(block_start + token) for token in range(len(block_TD))]
    block_keys = make_keys(weights, layer, block_TD, token_positions)
    past_keys = _sink_keys(config, memory, block_start) + _segment_keys(config, memory) + _seen_fam_keys(config, memory)
    attention_rows = []
    for token, query_HK in enumerate(make_queries(weights, layer, block_TD)):
        position = token_positions[token]
        seen = _within_window(config, position, past_keys + block_keys[: token + 1])
        attention_rows.append(attend(weights, query_HK, position, seen))
    attended_TD = torch.stack(attention_rows) @ layer.output_DxHK.T + block_TD
    out_TD = feed_forward(weights, layer, attended_TD) + attended_TD

    above_FD = None
    if len(block_TD) == config.block_size:
        if has_fam and config.has_slots:
            rows_FD = memory.initial_fam_FD if below_FD is None else below_FD
            queries, before = make_queries(weights.rows, fam_layer, rows_FD), _last_fam_keys(config, memory)
            seen = before + block_keys
            above_FD, shares_FHN = _run_rows(weights.rows, fam_layer, queries, fam_query_positions, seen, rows_FD)
            shares_FHT = shares_FHN[:, :, len(before) :]
            if config.takes_block:
                value_FW = _means(weights, _slots(weights, layer, block_TD), shares_FHT)
            else:
                value_FW = _slots(weights.rows, fam_layer, rows_FD)
            memory.fam_FD = _update_slots(weights, config, memory, value_FW, shares_FHT.sum(dim=2))
        elif has_fam:
            above_FD, shares_F = _compress(weights.rows, config, fam_layer, memory, block_keys, fam_query_positions)
            memory.fam_FD = _update_fam(config, memory, above_FD if config.fam_feeds == "same" else below_FD, shares_F)
        elif below_FD is not None:  # a layer without FAM carries the rows up: they see its block
            queries = make_queries(weights.rows, fam_layer, below_FD)
            above_FD, _ = _run_rows(weights.rows, fam_layer, queries, fam_query_positions, block_keys, below_FD)
        memory.block_keys.append(block_keys)
    return out_TD, above_FD


def _compress(
    weights: ReferenceWeights,
    config: FamConfig,
    layer: LayerWeights,
    memory: LayerMemory,
    block_keys: list[SeenKey],
    query_positions: list[float],
) -> tuple[Tensor, Tensor]:
    """Compress a complete block and the FAM before it into a new value of every row.

    Returns:
        New values (F, D), and the shares of the rows' attention that fell on the block, (F,), mean over heads.
    """
    is_first_update = len(memory.block_keys) == 0 and not memory.starts_from_saved_fam
    residual_FD = {
        "previous": torch.zeros_like(memory.fam_FD)
        if is_first_update and config.zero_first_residual
        else memory.fam_FD,
        "none": torch.zeros_like(memory.fam_FD),
        "initial": memory.initial_fam_FD,
    }[config.fam_residual]
    asking_FD = memory.fam_FD if config.fam_query == "previous" else memory.initial_fam_FD
    queries = make_queries(weights, layer, asking_FD)
    before = _last_fam_keys(config, memory)
    value_FD, shares_FHN = _run_rows(weights, layer, queries, query_positions, before + block_keys, residual_FD)
    return value_FD, shares_FHN[:, :, len(before) :].sum(dim=2).mean(dim=1)


def _run_rows(
    weights: ReferenceWeights,
    layer: LayerWeights,
    queries: Tensor,
    positions: list[float],
    seen: list[SeenKey],
    residual_FD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run a layer over FAM rows that all see the same keys.

    Returns:
        The layer's output (F, D), and the shares of attention that fell on every key, (F, H, N).
    """
    rows = list(zip(queries, positions, strict=True))
    attention = torch.stack([attend(weights, query_HK, position, seen) for query_HK, position in rows])
    shares = torch.stack([attention_shares(weights, query_HK, position, seen) for query_HK, position in rows])
    attended_FD = attention @ layer.output_DxHK.T + residual_FD
    return feed_forward(weights, layer, attended_FD) + attended_FD, shares


def _update_fam(config: FamConfig, memory: LayerMemory, value_FD: Tensor | None, shares_F: Tensor) -> Tensor:
    """Move the FAM to its new value: at once, or by the share of its attention that fell on the block.

    Args:
        config: every choice.
        memory: what the layer carries.
        value_FD: the new value; None where the FAM of the lowest layer stays, since it is fed from below.
        shares_F: the shares.
    """
    if value_FD is None:
        return memory.fam_FD
    is_first_update = len(memory.block_keys) == 0 and not memory.starts_from_saved_fam
    if config.fam_update == "gated" and not is_first_update:
        steps_F = torch.stack([_step(config, share) for share in shares_F])
        value_FD = memory.fam_FD + steps_F[:, None] * (value_FD - memory.fam_FD)
    return _bound_rows(config, value_FD)


def _slots(weights: ReferenceWeights, layer: LayerWeights, rows_FD: Tensor) -> Tensor:
    """Give the keys and values that a layer makes of rows, (F, 2 G K), not rotated."""
    keys = make_keys(weights, layer, rows_FD, [0.0] * len(rows_FD))
    return torch.stack([torch.cat([key.key_GK.flatten(), key.value_GK.flatten()]) for key in keys])


def _slot_keys(weights: ReferenceWeights, fam_FW: Tensor, positions: list[float]) -> list[SeenKey]:
    """List the slots of a FAM as keys and values at their positions."""
    parts_F2GK = fam_FW.view(len(fam_FW), 2, weights.num_key_value_heads, weights.head_dim)
    return [SeenKey(parts[0], parts[1], position) for parts, position in zip(parts_F2GK, positions, strict=True)]


def _means(weights: ReferenceWeights, block_TW: Tensor, shares_FHT: Tensor) -> Tensor:
    """Give the mean of a block's keys and values, (F, 2 G K), by the attention of each row and key/value head."""
    num_heads, head_dim = weights.num_key_value_heads, weights.head_dim
    block_T2GK = block_TW.view(len(block_TW), 2, num_heads, head_dim)
    rows = []
    for shares_HT in shares_FHT:
        mean_2GK = torch.zeros_like(block_T2GK[0])
        for head, group in enumerate(shares_HT.chunk(num_heads)):
            share_T = group.mean(dim=0) / group.mean(dim=0).sum()
            for token, share in enumerate(share_T):
                mean_2GK[:, head] = mean_2GK[:, head] + share * block_T2GK[token, :, head]
        rows.append(mean_2GK.flatten())
    return torch.stack(rows)


def _update_slots(
    weights: ReferenceWeights, config: FamConfig, memory: LayerMemory, value_FW: Tensor, shares_FH: Tensor
) -> Tensor:
    """Move the slots to their new value: at once, or by a share for each row or for each key/value head."""
    is_first_update = len(memory.block_keys) == 0 and not memory.starts_from_saved_fam
    if config.fam_update == "paper" or is_first_update:
        return value_FW
    heads = (2, weights.num_key_value_heads, weights.head_dim)
    rows = []
    for old_W, new_W, shares_H in zip(memory.fam_FD, value_FW, shares_FH, strict=True):
        shares_G = shares_H.view(weights.num_key_value_heads, -1).mean(dim=1)
        if config.fam_share == "row":
            shares_G = shares_H.mean().expand(weights.num_key_value_heads)
        steps_G = torch.stack([_step(config, share) for share in shares_G])
        old, new = old_W.view(heads), new_W.view(heads)
        rows.append((old + steps_G[None, :, None] * (new - old)).flatten())
    return torch.stack(rows)


def _step(config: FamConfig, share: Tensor) -> Tensor:
    """Give the step that a row takes towards its new value: none up to the threshold, all of it at a share of one."""
    if share <= config.fam_share_threshold:
        return torch.zeros_like(share)
    return (share - config.fam_share_threshold) / (1 - config.fam_share_threshold)


def _bound_rows(config: FamConfig, fam_FD: Tensor) -> Tensor:
    """Scale each row whose root mean square is above the bound down to it."""
    if config.fam_norm_bound is None:
        return fam_FD
    rows = []
    for row_D in fam_FD:
        root_mean_square = row_D.pow(2).mean().sqrt()
        is_long = root_mean_square > config.fam_norm_bound
        rows.append(row_D * (config.fam_norm_bound / root_mean_square) if is_long else row_D)
    return torch.stack(rows)


def _sink_keys(config: FamConfig, memory: LayerMemory, block_start: int) -> list[SeenKey]:
    """List the first tokens of the text once no memory segment holds them, moved in front of the memory segments."""
    num_blocks = len(memory.block_keys)
    if num_blocks <= config.num_memory_segments:
        return []
    first_position = block_start - config.num_memory_segments * config.block_size - config.num_sink_tokens
    sinks = memory.block_keys[0][: config.num_sink_tokens]
    if config.stop_gradient:
        sinks = _cut_graph(sinks)
    return [
        dataclasses.replace(key, position=float(first_position + sink), is_in_window=False)
        for sink, key in enumerate(sinks)
    ]


def _segment_keys(config: FamConfig, memory: LayerMemory) -> list[SeenKey]:
    """List the keys of the last blocks, oldest first."""
    oldest = max(0, len(memory.block_keys) - config.num_memory_segments)
    keys = [key for block in memory.block_keys[oldest:] for key in block]
    return _cut_graph(keys) if config.stop_gradient else keys


def _seen_fam_keys(config: FamConfig, memory: LayerMemory) -> list[SeenKey]:
    """List the keys of the last FAMs as tokens see them: with the bias, outside of every window."""
    return [
        dataclasses.replace(key, bias=config.fam_key_bias, is_in_window=False)
        for fam in _written_fam_keys(config, memory)[-config.num_previous_fams :]
        for key in fam
    ]


def _written_fam_keys(config: FamConfig, memory: LayerMemory) -> list[list[SeenKey]]:
    """List the keys of every FAM that is seen, oldest first: the initial one is not, where a reading starts empty."""
    is_unseen = config.fam_starts_empty and not memory.starts_from_saved_fam
    return memory.fam_keys[1:] if is_unseen else memory.fam_keys


def _last_fam_keys(config: FamConfig, memory: LayerMemory) -> list[SeenKey]:
    """List the keys of the FAM that the FAM rows see besides their block."""
    written = _written_fam_keys(config, memory)
    return written[-1] if written else []


def _within_window(config: FamConfig, query_position: float, keys: list[SeenKey]) -> list[SeenKey]:
    """Drop the tokens that are `window` or more positions before the query."""
    if config.window is None:
        return keys
    return [key for key in keys if not key.is_in_window or query_position - key.position < config.window]


def _cut_graph(keys: list[SeenKey]) -> list[SeenKey]:
    return [dataclasses.replace(key, key_GK=key.key_GK.detach(), value_GK=key.value_GK.detach()) for key in keys]


def _initial_fam(weights: ReferenceWeights, config: FamConfig, initial: Tensor | None, position_offset: int) -> Tensor:
    """Give what enters each layer as its initial FAM, (L, F, D).

    A prompt goes up through all layers, alone, each of its rows seeing all of them, at the place of the initial FAM
    stands.
    """
    if initial is None or config.fam_length == 0:
        return weights.embedding_VD.new_zeros(len(weights.layers), 0, weights.embedding_VD.shape[1])
    initial = initial.to(weights.embedding_VD.dtype)
    if config.fam_init == "prefix":
        return initial
    positions, _ = fam_positions(config, position_offset)
    hidden_FD = initial
    layer_inputs = []
    for layer in weights.layers:
        layer_inputs.append(hidden_FD)
        keys = make_keys(weights, layer, hidden_FD, positions)
        attention_rows = [
            attend(weights, query_HK, position, keys)
            for query_HK, position in zip(make_queries(weights, layer, hidden_FD), positions, strict=True)
        ]
        attended_FD = torch.stack(attention_rows) @ layer.output_DxHK.T + hidden_FD
        hidden_FD = feed_forward(weights, layer, attended_FD) + attended_FD
    return torch.stack(layer_inputs)


def _stack_fams(config: FamConfig, memories: list[LayerMemory]) -> Tensor:
    rows = [
        memory.fam_FD if config.carries_fam(layer_idx) else torch.zeros_like(memory.fam_FD)
        for layer_idx, memory in enumerate(memories)
    ]
    return torch.stack(rows)


def _check_shapes(
    weights: ReferenceWeights, config: FamConfig, input_ids: Tensor, initial: Tensor | None, saved_fam: Tensor | None
) -> None:
    if input_ids.ndim != 1 or len(input_ids) == 0:
        raise TransformerFamError(f"input_ids has the shape {tuple(input_ids.shape)}, required is (T,) with T >= 1")
    num_layers, width = len(weights.layers), weights.embedding_VD.shape[1]
    per_layer = (num_layers, config.fam_length, width)
    saved_width = 2 * weights.num_key_value_heads * weights.head_dim if config.has_slots else width
    per_saved = (num_layers, config.fam_length, saved_width)
    required = per_layer if config.fam_init == "prefix" else per_layer[1:]
    if config.fam_length > 0 and (initial is None or tuple(initial.shape) != required):
        given = None if initial is None else tuple(initial.shape)
        raise TransformerFamError(
            f"initial has the shape {given}, required is {required} for fam_init={config.fam_init!r}; "
            "pass the prompt or prefix of the model"
        )
    if saved_fam is not None and tuple(saved_fam.shape) != per_saved:
        raise TransformerFamError(
            f"saved_fam has the shape {tuple(saved_fam.shape)}, required is {per_saved}; pass a FAM of the same model"
        )
