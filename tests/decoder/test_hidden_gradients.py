"""Gradients of hidden states that a caller keeps, as those of the base model."""

from typing import Any

import pytest
import torch
from tiny_families import make_tiny
from tiny_llama import make_tiny_llama, random_ids

from transformerfam import FamConfig, convert
from transformerfam.errors import TransformerFamError
from transformerfam.rivals import RivalConfig, attach

IDS = random_ids(2, 20)
WIDE = FamConfig(block_size=8, fam_length=0, num_memory_segments=5)


def gradients(model: Any, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    output = model(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
    for hidden in output.hidden_states:
        hidden.retain_grad()
    weights = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(IDS) if mask is None else mask
    (output.logits * weights * real[..., None]).sum().backward()
    return [hidden.grad for hidden in output.hidden_states]


@pytest.mark.parametrize("case", ["llama", "gemma2", "falcon", "gpt_neox"])
def test_kept_gradients_are_those_of_the_base(case: str) -> None:
    """Catches hidden states off the path of the gradient, whose own is None."""
    expected = gradients(make_tiny(case))
    for found, required in zip(gradients(convert(make_tiny(case), WIDE)), expected, strict=True):
        torch.testing.assert_close(found, required, atol=1e-3, rtol=1e-3)


def test_kept_gradients_of_padded_rows_are_those_of_each_alone() -> None:
    """Catches gradients that stay where the pieces have them, not where the caller has the tokens."""
    config = FamConfig(block_size=8, fam_length=3, num_memory_segments=1, fam_key_bias=0.0)
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    found = gradients(convert(make_tiny_llama(), config), mask)
    weights = torch.randn(2, 20, 61, generator=torch.Generator().manual_seed(1))
    for row, start in ((0, 0), (1, 7)):
        output = convert(make_tiny_llama(), config)(input_ids=IDS[row : row + 1, start:], output_hidden_states=True)
        for hidden in output.hidden_states:
            hidden.retain_grad()
        (output.logits * weights[row, start:]).sum().backward()
        for kept, hidden in zip(found, output.hidden_states, strict=True):
            torch.testing.assert_close(kept[row, start:], hidden.grad[0], atol=1e-3, rtol=1e-3)
            assert not kept[row, :start].any()


def test_kept_gradient_counts_every_use_once_and_adds_up() -> None:
    model = convert(make_tiny_llama(), WIDE)
    grads = []
    for reader in (make_tiny_llama(), model):
        output = reader(input_ids=IDS, output_hidden_states=True)
        hidden = output.hidden_states[1]
        hidden.retain_grad()
        loss = output.logits.sum() + 3 * hidden.sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-3)


def test_gradients_that_cannot_be_kept_are_refused_by_name() -> None:
    """Catches a gradient that is None without a word."""
    model = convert(make_tiny_llama(), WIDE).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    rival = attach(make_tiny_llama(), RivalConfig(system="rmt", block_size=8))
    for reader, match in ((model, "switch activation checkpointing off"), (rival, "a rival's rows")):
        with pytest.raises(TransformerFamError, match=f"no gradient to keep: .*{match}"):
            reader(input_ids=IDS, output_hidden_states=True).hidden_states[1].retain_grad()


def test_hooks_on_hidden_states_are_refused_by_name() -> None:
    """Catches a hook that is never called, or sees a part of the gradient."""
    model = convert(make_tiny_llama(), WIDE)
    for hidden in model(input_ids=IDS, output_hidden_states=True).hidden_states[:-1]:
        with pytest.raises(TransformerFamError, match=r"a hook on .* call retain_grad\(\) and backward\(\)"):
            hidden.register_hook(lambda grad: grad)
