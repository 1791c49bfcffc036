"""Diversity and reconstruction loss against a plain computation from the reference's own parts."""

from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids, random_rows
from training_recipes import small_recipe, small_values

from transformerfam import FamConfig, convert
from transformerfam.errors import RecipeError
from transformerfam.fam.convert import fam_parameters
from transformerfam.reference.fam import ReferenceWeights, fam_positions, run_reference
from transformerfam.reference.layer import make_keys, make_queries, rotate
from transformerfam.training.data.instructions import weighed_batch
from transformerfam.training.recipe.data_sections import LossSection
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.step.auxiliary import AuxiliaryLosses, auxiliary_losses
from transformerfam.training.step.blocks import run_batch

SIZE, LENGTH = 6, 3
CONFIG = FamConfig(block_size=SIZE, fam_length=LENGTH, num_memory_segments=0, fam_key_bias=0.0)


def make_model() -> Any:
    model: Any = convert(make_tiny_llama(1), CONFIG)
    with torch.no_grad():
        fam_parameters(model)[0].copy_(random_rows(LENGTH, 32, seed=3))
    return model.train()


def loss_of(model: Any, ids: torch.Tensor, auxiliary: AuxiliaryLosses | None, checkpoint: bool = True) -> torch.Tensor:
    batch = weighed_batch(ids, torch.ones(ids.shape))
    state = model.init_state(len(ids))
    return run_batch(model, batch, state, [auxiliary] if auxiliary else [], checkpoint_blocks=checkpoint).loss


def attention_over(weights: Any, queries: Any, positions: list[float], seen: Any) -> torch.Tensor:
    """Return the weights `(T, H, N)` with which queries attend to keys, all of them in sight."""
    key_NGK = rotate(weights, torch.stack([k.key_GK for k in seen]), [k.position for k in seen])
    query_THK = rotate(weights, queries, positions)
    groups = weights.num_attention_heads // weights.num_key_value_heads
    logits = torch.einsum("thk,nhk->thn", query_THK, key_NGK.repeat_interleave(groups, 1)) / weights.head_dim**0.5
    return logits


@pytest.mark.parametrize("num_tokens", [SIZE, 2 * SIZE])
def test_diversity_is_the_negative_entropy_of_attention_over_the_fam(num_tokens: int) -> None:
    """Catches attention of FAM rows, of other keys or of another block that is counted."""
    model, ids = make_model(), random_ids(1, num_tokens)
    weights = ReferenceWeights.from_llama(model)
    fams = run_reference(weights, CONFIG, ids[0], initial=fam_parameters(model)[0]).fams
    layer, total = weights.layers[0], 0.0
    for block in range(num_tokens // SIZE):
        tokens_TD = weights.embedding_VD[ids[0, block * SIZE : (block + 1) * SIZE]]
        start = block * SIZE
        positions = [float(start + token) for token in range(SIZE)]
        key_positions, _ = fam_positions(CONFIG, start)
        seen = make_keys(weights, layer, fams[block][0], key_positions) + make_keys(
            weights, layer, tokens_TD, positions
        )
        logits = attention_over(weights, make_queries(weights, layer, tokens_TD), positions, seen)
        later = torch.triu(torch.ones(SIZE, SIZE, dtype=torch.bool), 1)
        logits[..., LENGTH:] = logits[..., LENGTH:].masked_fill(later[:, None], -torch.inf)
        share_F = logits.softmax(-1)[..., :LENGTH].mean((0, 1))
        share_F = share_F / share_F.sum()
        total += float((share_F * share_F.log()).sum().detach()) / (num_tokens // SIZE)
    plain = float(loss_of(model, ids, None).detach())
    auxiliary = AuxiliaryLosses(model, LossSection(diversity=0.7))
    assert float(loss_of(model, ids, auxiliary).detach()) - plain == pytest.approx(0.7 * total, rel=1e-4)


def test_reconstruction_is_the_error_of_attention_to_the_updated_fam() -> None:
    """Catches a FAM at another place than it is written, queries of another block, and another target."""
    model, ids = make_model(), random_ids(1, SIZE)
    weights = ReferenceWeights.from_llama(model)
    fams = run_reference(weights, CONFIG, ids[0], initial=fam_parameters(model)[0]).fams
    layer, tokens_TD = weights.layers[0], weights.embedding_VD[ids[0]]
    positions = [float(token) for token in range(SIZE)]
    queries = make_queries(weights, layer, tokens_TD)
    groups = weights.num_attention_heads // weights.num_key_value_heads

    def attend(seen: Any, mask: torch.Tensor) -> torch.Tensor:
        value_NHK = torch.stack([key.value_GK for key in seen]).repeat_interleave(groups, 1)
        logits = attention_over(weights, queries, positions, seen).masked_fill(mask[:, None], -torch.inf)
        return torch.einsum("thn,nhk->thk", logits.softmax(-1), value_NHK).flatten(1) @ layer.output_DxHK.T

    updated = make_keys(weights, layer, fams[1][0], fam_positions(CONFIG, SIZE)[0])
    again = attend(updated, torch.zeros(SIZE, LENGTH, dtype=torch.bool))
    seen = make_keys(weights, layer, fams[0][0], fam_positions(CONFIG, 0)[0])
    seen = seen + make_keys(weights, layer, tokens_TD, positions)
    later = torch.triu(torch.ones(SIZE, SIZE, dtype=torch.bool), 1)
    target = attend(seen, torch.cat((torch.zeros(SIZE, LENGTH, dtype=torch.bool), later), dim=1))
    expected = float((again - target).pow(2).mean().detach())
    plain = float(loss_of(model, ids, None).detach())
    auxiliary = AuxiliaryLosses(model, LossSection(reconstruction=2.0))
    assert float(loss_of(model, ids, auxiliary).detach()) - plain == pytest.approx(2.0 * expected, rel=1e-4)


def test_checkpoints_give_the_same_gradients_and_hooks_come_off() -> None:
    """Catches terms that are counted again when a block is computed again."""
    ids, gradients = random_ids(2, 3 * SIZE + 2), []
    for checkpoint in (True, False):
        model = make_model()
        auxiliary = AuxiliaryLosses(model, LossSection(diversity=0.3, reconstruction=0.5))
        loss_of(model, ids, auxiliary, checkpoint).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    plain = make_model()
    loss_of(plain, ids, None).backward()
    assert not torch.allclose(fam_parameters(plain)[0].grad, gradients[0]["model.fam.prompt"], rtol=1e-2)
    auxiliary.remove()
    assert torch.equal(loss_of(model, ids, None), loss_of(model, ids, auxiliary))


def test_recipes_ask_for_them_and_refuse_what_cannot_be() -> None:
    assert auxiliary_losses(make_model(), small_recipe()) is None
    assert auxiliary_losses(make_model(), small_recipe(loss={"diversity": 0.1})) is not None
    for sections, match in (
        ({"loss": {"diversity": 0.1}, "fam": {"fam_length": 0}}, "required is fam.fam_length above 0"),
        ({"loss": {"reconstruction": 0.1}, "fam": {"fam_query_position": "written"}}, "fam_query_position = 'current'"),
    ):
        with pytest.raises(RecipeError, match=match):
            build_recipe(small_values(**sections))
