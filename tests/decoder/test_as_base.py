"""A model with a memory, read as the base model that it was."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_families import CASES, CONFIG, draw_ids, make_tiny

from transformerfam import convert
from transformerfam.decoder.as_base import as_base, head_of_base
from transformerfam.errors import TransformerFamError
from transformerfam.rivals import RivalConfig, attach
from transformerfam.training.lora import fuse_lora
from transformerfam.weights.peft_adapters import inject_lora

FAST = ("llama", "gemma2", "gemma3_text", "gpt_oss", "falcon", "deepseek_v3")
"""Families that the fast tests read as their base."""
IDS = draw_ids(2, 20)
"""Longer than a block and its memory segments."""


def hidden_as_base(model: Any) -> torch.Tensor:
    with as_base(model) as read:
        hidden: torch.Tensor = read(input_ids=IDS).last_hidden_state
        return hidden


@torch.no_grad()
def hidden_of(model: Any) -> torch.Tensor:
    hidden: torch.Tensor = model.get_decoder()(input_ids=IDS).last_hidden_state
    return hidden


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_reads_as_before_its_conversion(case: str) -> None:
    """Catches a seam, a mask, a position or an attention back end of ours that stays in force."""
    model = make_tiny(case)
    expected, back_end = hidden_of(model), model.config._attn_implementation
    convert(model, CONFIG)
    own, own_back_end = hidden_of(model), model.config._attn_implementation
    torch.testing.assert_close(hidden_as_base(model), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(own, expected, atol=1e-4)
    assert torch.equal(hidden_of(model), own)
    assert model.config._attn_implementation == own_back_end
    assert back_end in (own_back_end, "sdpa")


@pytest.mark.parametrize("fam_lora", ["all", "rows"])
@pytest.mark.parametrize("fused", [False, True])
def test_adapters_are_out_of_force_and_come_back(fam_lora: str, fused: bool) -> None:
    """Catches a teacher that is taught, and adapters that are frozen afterwards."""
    model: Any = make_tiny("llama")
    expected = hidden_of(model)
    logits = model.get_output_embeddings()(expected).detach()
    convert(model, CONFIG.replace(fam_lora=fam_lora))
    targets = ["q_proj", "down_proj"] + (["lm_head"] if fam_lora == "all" else [])
    inject_lora(model, LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    if fused and fam_lora == "all":
        fuse_lora(model)
    model.train()
    own, trained = hidden_of(model), [p.requires_grad for p in model.parameters()]
    found = hidden_as_base(model)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_of_base(model)(found), logits, atol=1e-6, rtol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert any(trained)
    assert model.training
    assert torch.equal(hidden_of(model), own)


def test_merged_adapter_is_refused() -> None:
    """Catches a teacher whose weights are the trained ones."""
    model: Any = convert(make_tiny("llama"), CONFIG)
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    with pytest.raises(TransformerFamError, match="adapter is merged"):
        hidden_as_base(model)


def test_rival_reads_as_its_base() -> None:
    """Catches the attention of a rival that stays in force."""
    model: Any = make_tiny("llama")
    expected = hidden_of(model)
    attach(model, RivalConfig(system="infini", block_size=5))
    torch.testing.assert_close(hidden_as_base(model), expected, atol=1e-6, rtol=1e-5)
