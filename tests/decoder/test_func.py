"""torch.func on a converted model: its gradients are autograd's."""

from typing import Any

import peft
import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids

from transformerfam import FamConfig, convert
from transformerfam.rivals import RivalConfig, attach
from transformerfam.training.lora import fuse_lora
from transformerfam.weights.adapter import inject_lora

IDS = random_ids(2, 19)


def make(kind: str) -> Any:
    if kind == "rival":
        return attach(make_tiny_llama(), RivalConfig(system="rmt", block_size=8, num_memory_tokens=2))
    update = "gated" if kind == "gated" else "paper"
    config = FamConfig.preset(update, fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
    model: Any = convert(make_tiny_llama(), config)
    if kind == "fused LoRA":
        inject_lora(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert fuse_lora(model)
    elif kind != "paper" and kind != "gated":
        model.set_attn_implementation(kind)
    return model


@pytest.mark.parametrize("kind", ["paper", "gated", "eager", "sdpa", "fused LoRA", "rival"])
def test_functional_gradients_are_those_of_autograd(kind: str) -> None:
    """Catches an operation of ours that torch.func cannot go through."""
    model = make(kind)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: value.grad for name, value in parameters.items()}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, kwargs={"input_ids": IDS, "labels": IDS}).loss

    found = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    for name, gradient in expected.items():
        assert gradient is None or gradient.abs().max() > 0 or "fam" in name, name
        required = torch.zeros_like(found[name]) if gradient is None else gradient
        torch.testing.assert_close(found[name], required, msg=name)
