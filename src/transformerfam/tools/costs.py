"""What reading and training cost, counted: floating-point operations, and the cache that full attention would keep.

An operation is one multiplication or one addition. Counted are the matrix products and the attention that no mask
throws away; norms, rotary tables, activations and residuals are left out (about 1 % of it).

A plan, the demo and the benchmarks count here: by a converted model, whose layers may differ, or by `ModelShape`, the
sizes in a configuration of equal layers. torch.utils.flop_counter is the tests' judge and not the count itself: of
small models on fake tensors it gives 6 to 10 % more, for the masked pairs of eager attention, or 9 to 18 % less, since
it does not know fused attention on the CPU, and a third to a half of the operations of experts.

Source: section 3.1 of arXiv 2404.09173, "linear time, constant memory".
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from transformerfam.config import FamConfig
from transformerfam.decoder.served import decoder_layers
from transformerfam.fam.layer import LayerPlan
from transformerfam.fam.memory import memory_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its costs follow from."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """Read the sizes off a transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
        )

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """Return the (input, output) widths of a layer's matrix products, in the order of their use."""
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        width, inner = self.hidden_size, self.intermediate_size
        return (
            (width, queries),
            (width, keys),
            (width, keys),
            (queries, width),
            (width, inner),
            (width, inner),
            (inner, width),
        )

    @property
    def flops_per_row(self) -> int:
        """Operations of all layers' matrix products for one token or FAM row."""
        return self.num_layers * sum(2 * rows * columns for rows, columns in self.layer_matrices)

    @property
    def flops_per_pair(self) -> int:
        """Operations of all layers' attention for one query and one key that it sees."""
        return self.num_layers * 4 * self.num_heads * self.head_dim

    @property
    def flops_per_logits(self) -> int:
        """Operations of the language-model head for one token."""
        return 2 * self.hidden_size * self.vocab_size

    @property
    def key_value_elements(self) -> int:
        """Numbers that the keys and values of one token take in all layers."""
        return self.num_layers * 2 * self.num_key_value_heads * self.head_dim

    def cache_elements(self, num_tokens: int, window: int | None = None) -> int:
        """Numbers that the keys and values of so many tokens take in all layers, or those of a sliding window."""
        return _cache_elements([(self.key_value_elements, window)], num_tokens)


def rows_in_front(config: FamConfig, caches_queries: bool = False) -> int:
    """Return the rows that go through the layers in front of a block's tokens.

    Args:
        config: the configuration.
        caches_queries: whether the family and the attention back end take cached queries of the initial FAM, by which F
            rows serve where 2 F would.
    """
    if caches_queries and config.fam_position != "zero":
        return config.fam_length
    return config.num_rows if config.fam_length else 0


def block_flops(
    shape: ModelShape, config: FamConfig, memory_segments: int | None = None, caches_queries: bool = False
) -> int:
    """Return the operations of reading one block with its update of the FAM, without logits.

    Args:
        shape: the model's sizes.
        config: block size, FAM length, memory segments and older FAMs; every layer is taken to carry FAM.
        memory_segments: memory segments in sight; None is all that the configuration has, as from the m-th block on.
        caches_queries: as for `rows_in_front`.
    """
    segments = config.num_memory_segments if memory_segments is None else memory_segments
    num_rows = rows_in_front(config, caches_queries)
    pairs = pairs_of_block(config, config.num_sink_tokens + segments * config.block_size, num_rows)
    rows = (config.block_size + num_rows) * shape.flops_per_row
    return rows + pairs * shape.flops_per_pair + mean_flops(config, shape.key_value_elements)


def pairs_of_block(
    config: FamConfig, num_before: int, num_rows: int, has_fam: bool = True, window: int | None = None
) -> int:
    """Return the pairs of a query and a key that it sees in one layer, of one block's tokens and FAM rows.

    Args:
        config: block size and FAM length.
        num_before: tokens in sight in front of the block.
        num_rows: FAM rows, see `rows_in_front`.
        has_fam: whether the layer carries a FAM.
        window: the layer's own sliding window in tokens, if it has one.
    """
    size = config.block_size
    pairs = size * num_before + size * (size + 1) // 2
    if window is not None:
        pairs = min(pairs, size * window)
    return pairs + size * config.num_fam_slots + num_rows * (config.fam_length + size) if has_fam else pairs


def mean_flops(config: FamConfig, key_value_elements: int) -> int:
    """Return the operations by which a block's keys and values go into the means of the FAM's slots."""
    return 2 * config.fam_length * config.block_size * key_value_elements if config.takes_block else 0


def full_attention_flops(shape: ModelShape, num_tokens: int) -> int:
    """Return the operations of reading tokens with full causal attention, without logits."""
    return num_tokens * shape.flops_per_row + num_tokens * (num_tokens + 1) // 2 * shape.flops_per_pair


def sliding_window_flops(shape: ModelShape, num_tokens: int, window: int) -> int:
    """Return the operations of reading tokens that see so many each, without logits."""
    return num_tokens * (shape.flops_per_row + window * shape.flops_per_pair)


def training_flops(
    products: float,
    attention: float,
    logits: float,
    *,
    adapters: float = 0.0,
    is_frozen: bool = False,
    keeps_logits: bool = False,
) -> float:
    """Return the operations of a training step, by those of its parts forward.

    What is checkpointed is made again. Backward, a product of two things that are trained costs two more, one with a
    frozen matrix one.

    Args:
        products: of the layers' matrices.
        attention: of attention and the means of keys and values.
        logits: of the language-model head.
        adapters: of LoRA's matrices.
        is_frozen: whether the layers' matrices and the head are not trained.
        keeps_logits: whether the logits are not made again.
    """
    passes = 3 if is_frozen else 4
    return passes * (products + logits) + 4 * (adapters + attention) - (logits if keeps_logits else 0)


def flops_per_token(model: Any, is_frozen: bool) -> tuple[float, float]:
    """Return the operations per token of reading and of training a converted model, the update of the FAM included.

    Args:
        model: whose layers may have other widths, windows and experts.
        is_frozen: whether its matrices are not trained, LoRA's aside.
    """
    config, fam, memory = model.config, model.fam_config, memory_of(model)
    num_rows = rows_in_front(fam, memory.caches_queries)
    rows_per_token = 1 + num_rows / fam.block_size
    attention = 0.0
    widths = _pair_widths(model)
    for layout, plan, width in zip(memory.layouts, memory.plans(), widths, strict=True):
        pairs = _pairs_of_layer(fam, plan, num_rows)
        elements = layout.key_shape[0] * layout.key_shape[1] + layout.value_shape[0] * layout.value_shape[1]
        means = mean_flops(fam, elements) if plan.has_fam else 0
        attention += (2 * config.num_attention_heads * width * pairs + means) / fam.block_size
    products, adapters = (rows_per_token * flops for flops in _flops_per_row(model))
    logits = 2 * config.hidden_size * config.vocab_size
    return products + attention, training_flops(products, attention, logits, adapters=adapters, is_frozen=is_frozen)


def full_cache_bytes(model: Any, num_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values that the base model would keep of a text: its full attention's cache.

    Args:
        model: a converted model.
        num_tokens: of the text; layers with a sliding window keep no more than that.
        dtype: of keys and values.
    """
    return _cache_elements(cache_layers(model), num_tokens) * dtype.itemsize


def cache_layers(model: Any) -> list[tuple[int, int | None]]:
    """Return of every layer of the base model the numbers that its cache keeps of a token, and its window in tokens.

    Args:
        model: a converted model.
    """
    layers = []
    for layout in memory_of(model).layouts:
        (key_heads, key_width), (value_heads, value_width) = layout.key_shape, layout.value_shape
        layers.append((key_heads * key_width + value_heads * value_width, layout.window))
    return layers


def _cache_elements(layers: Iterable[tuple[int, int | None]], num_tokens: int) -> int:
    """Return the numbers in the caches of layers, by those of one token and the window of each."""
    return sum(numbers * (num_tokens if window is None else min(num_tokens, window)) for numbers, window in layers)


def _pair_widths(model: Any) -> list[int]:
    """Return for every layer the numbers of one head's key and value that attention multiplies."""
    config, layouts = model.config, memory_of(model).layouts
    if getattr(config, "kv_lora_rank", None):  # what is kept is narrower than a head
        return [config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim] * len(layouts)
    return [layout.key_shape[1] + layout.value_shape[1] for layout in layouts]


def _pairs_of_layer(fam: FamConfig, plan: LayerPlan, num_rows: int) -> int:
    return pairs_of_block(fam, plan.num_sink_tokens + plan.num_memory_tokens, num_rows, plan.has_fam, plan.window)


def _flops_per_row(model: Any) -> tuple[float, float]:
    """Return the operations of all layers' matrices for one row, and those of LoRA's; of experts those chosen."""
    config = model.config
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    num_experts = num_experts or getattr(config, "n_routed_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    share, own, adapters = chosen / num_experts, 0.0, 0.0
    for layer in decoder_layers(model):
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                adapters += 2 * parameter.numel()
            elif parameter.dim() > 1:
                own += 2 * parameter.numel() * (share if ".experts." in name else 1.0)
    return own, adapters
