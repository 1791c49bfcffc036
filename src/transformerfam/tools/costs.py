"""What a reading costs, counted: floating-point operations and bytes, from the shapes of a model and its memory.

An operation is one multiplication or one addition. Counted are the matrix products and the attention that no mask
throws away; norms, rotary tables, activations and residuals are left out (about 1 % of it).

Source: section 3.1 of arXiv 2404.09173, "linear time, constant memory".
"""

import dataclasses
from typing import Any

from transformerfam.config import FamConfig


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
    size, length = config.block_size, config.fam_length
    segments = config.num_memory_segments if memory_segments is None else memory_segments
    before = config.num_sink_tokens + segments * size + config.num_fam_slots
    token_pairs = size * before + size * (size + 1) // 2
    num_rows = rows_in_front(config, caches_queries)
    row_pairs = num_rows * (length + size)
    rows = size + num_rows
    mixed = length * size if config.takes_block else 0  # keys and values of which means are made
    means = mixed * shape.flops_per_pair * shape.num_key_value_heads // shape.num_heads
    return rows * shape.flops_per_row + (token_pairs + row_pairs) * shape.flops_per_pair + means


def full_attention_flops(shape: ModelShape, num_tokens: int) -> int:
    """Return the operations of reading tokens with full causal attention, without logits."""
    return num_tokens * shape.flops_per_row + num_tokens * (num_tokens + 1) // 2 * shape.flops_per_pair
