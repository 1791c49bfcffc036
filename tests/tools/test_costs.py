"""The counted costs: against the operations that torch counts while a model runs, and the figures known by hand."""

from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids
from torch.utils.flop_counter import FlopCounterMode

from transformerfam import FamConfig, convert
from transformerfam.tools.costs import ModelShape, block_flops, full_attention_flops


def angle_flops(shape: ModelShape, num_rows: int) -> tuple[int, int]:
    """Return what the angles of RoPE may count for: nothing, or in older transformers one matrix product."""
    return 0, num_rows * shape.head_dim


SMOLLM2 = ModelShape(
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
)


@pytest.mark.parametrize(("num_memory_segments", "ratio"), [(0, 1.090), (3, 1.049)])
def test_fam_over_bswa_of_smollm2(num_memory_segments: int, ratio: float) -> None:
    """Catches rows or pairs that are counted twice or not at all."""
    fam = FamConfig(block_size=1024, fam_length=64, num_memory_segments=num_memory_segments)
    counted = block_flops(SMOLLM2, fam) / block_flops(SMOLLM2, fam.replace(fam_length=0))
    assert counted == pytest.approx(ratio, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("config", [{"fam_length": 0}, {"fam_length": 4}, {"fam_length": 4, "fam_copy": False}])
def test_block_flops_are_those_that_torch_counts(config: dict[str, Any]) -> None:
    """Catches a matrix or an attention that the count leaves out: without masked pairs, both must agree."""
    block_size = 16
    fam_config = FamConfig(fam_key_bias=0.0, block_size=block_size, num_memory_segments=1, **config)
    model: Any = convert(make_tiny_llama(), fam_config)
    model.set_attn_implementation("eager")  # its matrix products are counted on every machine
    shape = ModelShape.of(model.config)
    state = model.read(random_ids(block_size))
    with FlopCounterMode(display=False) as counter:
        model.read(random_ids(block_size, seed=1), state)
    length = fam_config.num_rows if fam_config.fam_length else 0
    masked = block_size * (block_size - 1) // 2  # eager attention computes what lies after a token too
    masked += length * block_size  # and the memory segment for FAM rows
    expected = block_flops(shape, fam_config) + masked * shape.flops_per_pair
    assert counter.get_total_flops() - expected in angle_flops(shape, block_size + length)


@torch.no_grad()
def test_full_attention_flops_are_those_that_torch_counts() -> None:
    model: Any = make_tiny_llama()
    model.set_attn_implementation("eager")
    shape = ModelShape.of(model.config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=random_ids(1, 12), logits_to_keep=1)
    masked = 12 * 11 // 2 * shape.flops_per_pair
    expected = full_attention_flops(shape, 12) + masked + shape.flops_per_logits
    assert counter.get_total_flops() - expected in angle_flops(shape, 12)
