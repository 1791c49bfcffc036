"""A FAM that outgrows float16: rows stay finite in every family, and what is not finite is named where it begins."""

from typing import Any

import pytest
import torch
from tiny_families import draw_ids, every_case, make_tiny
from tiny_llama import make_tiny_llama, random_ids, random_rows

from transformerfam import FamConfig, convert
from transformerfam.errors import TransformerFamError
from transformerfam.fam.convert import personal_memory

CONFIG = FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_key_bias=0.0)
LARGEST = torch.finfo(torch.float16).max


def relative_error(there: torch.Tensor, required: torch.Tensor) -> float:
    return float((there.float() - required.float()).norm() / required.float().norm())


@torch.no_grad()
def test_fam_that_grows_past_float16_is_that_of_float32() -> None:
    """Catches a row that is cast unchecked: with the paper's update every logit was NaN from one block on."""
    ids, fams, logits = random_ids(1, 60 * CONFIG.block_size), [], []
    for dtype in (torch.float32, torch.float16):
        base = make_tiny_llama()
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.mul_(4000)
        model: Any = convert(base.to(dtype), CONFIG)
        state = model.init_state(1)
        logits.append(model(input_ids=ids, past_key_values=state).logits)
        fams.append(state.fams)
    assert float(fams[0].abs().max()) > 1.5 * LARGEST
    assert relative_error(fams[1], fams[0]) < 0.05
    assert relative_error(logits[1], logits[0]) < 0.05


@every_case
@pytest.mark.parametrize("fam_dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
@torch.no_grad()
def test_saved_fam_larger_than_float16_gives_finite_numbers(case: str, fam_dtype: Any) -> None:
    """Catches a family, and a way into a layer, where large rows become infinite."""
    model: Any = convert(make_tiny(case).to(torch.float16), CONFIG.replace(fam_dtype=fam_dtype))
    fam = 1e6 * random_rows(3, CONFIG.fam_length, model.config.hidden_size, seed=1)
    state = model.init_state(1, fam=fam)
    assert model(input_ids=draw_ids(1, 17), past_key_values=state).logits.isfinite().all()
    assert state.fams.isfinite().all()


@torch.no_grad()
def test_personal_memory_larger_than_float16_keeps_its_direction() -> None:
    fam = 1e6 * random_rows(2, CONFIG.fam_length, 32, seed=1)
    logits = []
    for dtype in (torch.float32, torch.float16):
        model = convert(make_tiny_llama(2).to(dtype), CONFIG)
        personal_memory(model, fam)
        logits.append(model(input_ids=random_ids(1, 4)).logits)
    assert relative_error(logits[1], logits[0]) < 0.02


@torch.no_grad()
def test_float16_model_with_a_massive_dimension_is_converted() -> None:
    """Catches checks that draw rows as large as an embedding's largest numbers."""
    base = make_tiny_llama()
    base.get_input_embeddings().weight[:, 3] = 28_800
    convert(base.to(torch.float16), CONFIG)


@torch.no_grad()
def test_fam_that_is_not_finite_is_named_and_not_taken() -> None:
    """Catches NaN that stays in the memory for good, and is first seen in an answer."""
    model: Any = convert(make_tiny_llama(), CONFIG)
    ids = random_ids(1, 20)
    state = model.read(ids[:, :12])
    broken = model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, output: output * float("inf"))
    with pytest.raises(TransformerFamError, match="FAM of layer 1 is not finite after block 2, so the memory"):
        model(input_ids=ids[:, 12:], past_key_values=state)
    broken.remove()
    assert state.num_tokens_read == 12
    model(input_ids=ids[:, 12:], past_key_values=state)
    torch.testing.assert_close(state.fams, model.read(ids).fams)
