"""The attention back end without masks: what it sees is what the mask says, and the masked call is what it computes.

Outputs and gradients are compared with one masked call in float64, the fast calls running in float32: what is between
them is rounding, below 1e-6 of the largest entry on these sizes; a key too many or too few moves entries by a tenth.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import make_tiny_llama, random_ids, random_rows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transformerfam import FamConfig, convert
from transformerfam.decoder.kernels import Sight, attend_piece
from transformerfam.fam.piece import Piece

TOLERANCE = 1e-5


def mask_of(sight: Sight, num_tokens: int, num_keys: int) -> Tensor:
    """Say in a mask `(R + T, S)` what a `Sight` says."""
    keys = torch.arange(num_keys)
    rows = (keys >= sight.first_row_key).expand(sight.num_rows, -1)
    distance = torch.arange(num_tokens)[:, None] + num_keys - num_tokens - keys
    tokens = (distance >= 0) & (distance < (sight.window or num_keys + 1))
    return torch.cat((rows, tokens))


@pytest.mark.parametrize("dropout", [0.0, 1e-12])  # with dropout tokens are one call, with a mask
@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "num_before", "num_groups"),
    [
        (0, 1, 5, 2),
        (2, 1, 5, 2),
        (2, 1, 2, 4),
        (0, 7, 0, 4),
        (3, 7, 3, 1),
        (2, 129, 2, 2),
        (8, 300, 40, 2),
        (5, 0, 5, 2),
    ],
)
def test_calls_without_mask_match_one_masked_call(
    num_rows: int,
    num_tokens: int,
    num_before: int,
    num_groups: int,
    dropout: float,
) -> None:
    """Catches a call that stops one key early or late, rows that lose their order, and a lost gradient."""
    num_heads, num_keys = 4, num_before + num_tokens
    sight = Sight(num_rows, max(0, num_before - num_rows))
    query = random_rows(2, num_heads, num_rows + num_tokens, 8, seed=1).requires_grad_()
    key = random_rows(2, num_groups, num_keys, 8, seed=2).requires_grad_()
    value = random_rows(2, num_groups, num_keys, 8, seed=3).requires_grad_()
    weighting = random_rows(2, num_rows + num_tokens, num_heads, 8, seed=4)

    output, no_weights = attend_piece(torch.nn.Module(), query, key, value, sight, dropout, scaling=0.7)
    assert no_weights is None
    found = torch.autograd.grad((output * weighting).sum(), (query, key, value))

    mask = mask_of(sight, num_tokens, num_keys)
    repeats = num_heads // num_groups
    required = scaled_dot_product_attention(
        query.double(),
        key.double().repeat_interleave(repeats, dim=1),
        value.double().repeat_interleave(repeats, dim=1),
        attn_mask=mask,
        scale=0.7,
    ).transpose(1, 2)
    expected = torch.autograd.grad((required * weighting).sum(), (query, key, value))
    for there, wanted in zip((output, *found), (required, *expected), strict=True):
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(there.double(), wanted.double(), atol=TOLERANCE * scale, rtol=0)


configurations = st.builds(
    FamConfig,
    block_size=st.just(4),
    fam_length=st.integers(0, 3),
    num_memory_segments=st.integers(0, 2),
    num_previous_fams=st.integers(1, 3),
    num_sink_tokens=st.integers(0, 2),
    window=st.sampled_from([None, None, None, 3]),
    fam_query=st.sampled_from(["previous", "initial"]),
    fam_layers=st.sampled_from([None, (1,)]),
    fam_key_bias=st.sampled_from([0.0, 0.0, 0.0, -2.0]),
)


@settings(max_examples=25, deadline=None)
@given(config=configurations, counts=st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_sight_says_what_the_mask_says(config: FamConfig, counts: list[int]) -> None:
    """Catches a slot that one of the two counts as filled, at every phase of the first blocks."""
    model: Any = convert(make_tiny_llama(), config)
    state = model.init_state()
    with torch.no_grad():
        for position, count in enumerate(counts):
            count = min(count, config.block_size - state.block_fill[0])
            piece = Piece(state, [count])
            for layer in state.layers:
                mask = piece.mask(layer, torch.float32, torch.device("cpu"))[0, 0]
                sight = piece.sight(layer)
                has_bias = layer.fam is not None and config.fam_key_bias != 0
                assert sight is not None or layer.plan.window is not None or has_bias or config.num_previous_fams > 2
                if sight is not None:
                    assert torch.equal(mask == 0, mask_of(sight, count, mask.shape[1]))
            model.read(random_ids(count, seed=position), state)


@torch.no_grad()
@pytest.mark.parametrize("fam_length", [0, 2])
def test_conversion_takes_the_back_end_and_sdpa_switches_it_off(
    monkeypatch: pytest.MonkeyPatch, fam_length: int
) -> None:
    """Catches a model that runs on dense masks all the time, and a switch that does nothing."""
    config = FamConfig(fam_key_bias=0.0, block_size=4, fam_length=fam_length, num_memory_segments=1)
    model = convert(make_tiny_llama(), config)
    ids = random_ids(1, 30)
    assert model.config._attn_implementation == "fam"
    num_masks = 0
    original = Piece.mask

    def counted(self: Piece, *args: Any) -> Tensor:
        nonlocal num_masks
        num_masks += 1
        return original(self, *args)

    monkeypatch.setattr(Piece, "mask", counted)
    fast = model(input_ids=ids).logits
    assert num_masks == 0
    model.set_attn_implementation("sdpa")
    masked = model(input_ids=ids).logits
    assert num_masks > 0
    torch.testing.assert_close(fast, masked, atol=1e-5, rtol=0)


@torch.no_grad()
def test_back_end_serves_a_model_that_is_not_converted() -> None:
    """Catches a base model's own causal mask that is lost on the way, for example in a teacher's pass."""
    model, ids = make_tiny_llama(), random_ids(2, 9)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    expected = model(input_ids=ids, attention_mask=padding).logits[:, 2:]
    model.set_attn_implementation("fam")
    torch.testing.assert_close(model(input_ids=ids, attention_mask=padding).logits[:, 2:], expected)
