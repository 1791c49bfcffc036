"""Fused LoRA layers are PEFT's: the same outputs and gradients, and PEFT's own way where they are not plain."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids, random_rows
from training_recipes import small_recipe

from transformerfam import FamConfig, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.errors import RecipeError
from transformerfam.training.lora import fuse_lora, unfuse_lora
from transformerfam.training.setup import build_trainee
from transformerfam.training.tiny import build_tiny_tokenizer
from transformerfam.training.trainer import Trainer
from transformerfam.weights.adapter import inject_lora, merge_lora
from transformerfam.weights.models import load_model

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def make_model(**fields: Any) -> Any:
    """Return a converted model with LoRA whose second factor is not zero."""
    model = convert(make_tiny_llama(), FamConfig(block_size=5, fam_length=2, num_memory_segments=0, fam_key_bias=0.0))
    inject_lora(model, peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=list(TARGETS), **fields))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = 0.1 * random_rows(*parameter.shape, seed=seed)
    return model


def outputs_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=random_ids(2, 13), past_key_values=model.init_state(2)).logits
    (logits * random_rows(*logits.shape, seed=1)).sum().backward()
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_outputs_and_gradients_are_those_of_peft() -> None:
    """Catches a factor scaled twice or not at all, a gradient that is lost, and one of the base weights."""
    model = make_model()
    expected, expected_gradients = outputs_and_gradients(model)
    assert fuse_lora(model) == 2 * len(TARGETS)
    found, gradients = outputs_and_gradients(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    assert sum("lora_" in name for name in gradients) == 4 * len(TARGETS)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0)


def test_fused_layers_are_left_copied_and_merged_as_others() -> None:
    """Catches a copy that computes with the weights it was copied from, and a fused layer that is not copied."""
    model = make_model()
    expected, _ = outputs_and_gradients(model)
    fuse_lora(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    plain = convert(make_tiny_llama(), model.fam_config)
    torch.testing.assert_close(outputs_and_gradients(copied)[0], outputs_and_gradients(plain)[0], atol=1e-5, rtol=1e-5)
    unfuse_lora(model)
    assert not any(
        "forward" in layer.__dict__ for layer in model.modules() if isinstance(layer, peft.tuners.lora.Linear)
    )
    fuse_lora(model)
    merge_lora(model)
    assert not any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in model.modules())
    torch.testing.assert_close(outputs_and_gradients(model)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["paper", "gated", "gated_rows"])
@pytest.mark.parametrize("way", ["autocast", "bfloat16 weights"])
def test_gradients_in_bfloat16_are_near_those_in_float32(way: str, preset: str) -> None:
    """Catches a fused product that autocast breaks, and gradients off by more than a tenth of their norm, on a model
    of sharp attention."""
    grads = []
    for is_half in (False, True):
        torch.manual_seed(0)
        config = FamConfig.preset(preset, block_size=5, fam_length=2, num_memory_segments=0, fam_key_bias=0.0)
        model: Any = convert(make_tiny_llama(), config)
        inject_lora(model, peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=list(TARGETS)))
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.data = 0.1 * random_rows(*parameter.shape, seed=seed)
            elif "fam" in name:
                parameter.data = random_rows(*parameter.shape, seed=seed)
        if is_half and way != "autocast":
            hold_weights_in("bfloat16", model, only_frozen=True)
        assert fuse_lora(model) == 2 * len(TARGETS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half and way == "autocast"):
            logits = model(input_ids=random_ids(2, 13), past_key_values=model.init_state(2)).logits
        (logits.float() * random_rows(*logits.shape, seed=1)).sum().backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {p.grad.dtype for p in trained.values()} == {torch.float32}
        grads.append(torch.cat([p.grad.flatten() for p in trained.values()]))
    assert torch.linalg.vector_norm(grads[1] - grads[0]) < 0.1 * torch.linalg.vector_norm(grads[0])


def test_recipe_trains_in_bfloat16(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Catches a FAM, LoRA or average that is kept in bfloat16, and a memory that says it has another base."""
    base = make_tiny_llama()
    base.save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    sections: dict[str, Any] = {
        "model": {"base": str(tmp_path / "base"), "dtype": "bfloat16"},
        "lora": {"rank": 2, "targets": ["q_proj", "down_proj"]},
        "fam": UPDATE_PRESETS["gated"] | {"fam_norm_bound": math.inf},
    }
    trainer = Trainer(small_recipe(**sections), tmp_path / "run")
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert trainer.run().is_complete
    model, _ = load_model(tmp_path / "run")
    assert model.dtype == torch.float32
    assert not [w for w in recwarn if "other" in str(w.message)]
    with pytest.raises(RecipeError, match="model.dtype is 'bfloat16', required is 'float32' where all weights"):
        small_recipe(model={"dtype": "bfloat16"})


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("fields", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_layers_stay_as_they_are(fields: dict[str, Any]) -> None:
    """Catches dropout, a magnitude or a bias that is silently left out."""
    assert fuse_lora(make_model(**fields)) == 0


def test_recipe_switches_it_off() -> None:
    """Catches a switch that does nothing."""
    for fused in (True, False):
        model, _ = build_trainee(small_recipe(lora={"rank": 2, "fused": fused}))
        layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.Linear)]
        assert layers
        assert all(("forward" in layer.__dict__) == fused for layer in layers)
