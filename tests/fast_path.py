"""How near a converted model has to come to the reference, and what is compared of both."""

from typing import Any

import torch
from tiny_llama import VOCABULARY, random_ids
from torch import Tensor

from transformerfam.decoder.positions import fam_offsets
from transformerfam.reference.fam import ReferenceWeights
from transformerfam.reference.layer import rotate

LOGITS_TOLERANCE = 4e-5


GRADIENT_TOLERANCE = 1.5e-4


def turned(model: Any, fam: Tensor, sign: int = 1) -> Tensor:
    """Return a FAM with its keys turned to its place after a block, or back: the reference has them unturned."""
    config = model.fam_config
    if not config.has_slots:
        return fam
    weights = ReferenceWeights.from_llama(model)
    parts = fam.view(*fam.shape[:-1], 2, weights.num_key_value_heads, weights.head_dim)
    key = parts[..., 0, :, :]
    positions = [sign * position for position in fam_offsets(config).tolist()]
    rows = [
        rotate(weights, key.select(-3, row)[None].flatten(0, -3), [p] * key[..., 0, 0, 0].numel())
        for row, p in enumerate(positions)
    ]
    key = torch.stack([row.view(key.select(-3, 0).shape) for row in rows], dim=-3)
    return torch.stack((key, parts[..., 1, :, :]), dim=-3).flatten(-3)


def assert_near(there: Tensor, required: Tensor, tolerance: float, what: str, floor: float = 1e-3) -> None:
    """Compare with a tolerance relative to the largest required entry, taken as `floor` where it is smaller."""
    assert there.shape == required.shape, f"{what}: {tuple(there.shape)} is not {tuple(required.shape)}"
    error = (there.double() - required.double()).abs().max() / required.double().abs().max().clamp(min=floor)
    assert float(error.detach()) <= tolerance, f"{what} off by {float(error.detach()):.1e} of the largest entry"


def take_gradients(model: Any) -> dict[str, Tensor]:
    """Return all gradients, zeros where none arrived, and clear them."""
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return grads


@torch.no_grad()
def assert_no_token_sees_the_future(model: Any, tolerance: float, least: float) -> None:
    """Change one token at a time: what comes before it stays within `tolerance`, what follows changes by `least`."""
    ids = random_ids(1, 30)
    before = model(input_ids=ids).logits
    for position in (3, 8, 15, 29):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % VOCABULARY
        after = model(input_ids=changed).logits
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=tolerance, rtol=0)
        assert (after[:, position:] - before[:, position:]).abs().max() > least
