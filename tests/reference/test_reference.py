"""The reference against formulas written out by hand, against transformers, and every choice against its default.

All comparisons run in float64, where rounding stays below 1e-12 on models of this size; tolerances of 1e-9 leave room
for the order of sums alone. Where transformers takes part, its norm and angles are float32: 2e-5 there.
"""

import math
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids, random_rows
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.reference.fam import ReferenceResult, ReferenceWeights, fam_positions, run_reference
from transformerfam.reference.layer import LayerWeights, attend, feed_forward, make_keys, make_queries

EXACT = {"rtol": 0, "atol": 1e-9}
BASE = {"fam_key_bias": 0.0, "block_size": 4, "fam_length": 2, "num_memory_segments": 1}


def run(num_tokens: int = 14, *, num_layers: int = 2, seed: int = 0, **options: Any) -> ReferenceResult:
    """Run the reference in float64 on random weights, ids and initial rows."""
    keywords = {name: options.pop(name) for name in ("position_offset", "saved_fam") if name in options}
    input_ids = options.pop("input_ids", None)
    config = FamConfig(**{**BASE, **options})
    shape = (config.fam_length, 32) if config.fam_init == "prompt" else (num_layers, config.fam_length, 32)
    return run_reference(
        ReferenceWeights.from_llama(make_tiny_llama(num_layers)),
        config,
        random_ids(num_tokens, seed=seed) if input_ids is None else input_ids,
        initial=random_rows(*shape, seed=7).double(),
        dtype=torch.float64,
        **keywords,
    )


def one_pair_weights() -> ReferenceWeights:
    """One layer, one head of one rotated pair, width 2, every matrix the identity, no feed-forward.

    With a norm scale of 1 and epsilon 0 a layer input x attends as x / rms(x); angles are one radian per position.
    """
    eye = torch.eye(2, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    layer = LayerWeights(
        attention_norm_D=ones,
        query_HKxD=eye,
        key_GKxD=eye,
        value_GKxD=eye,
        output_DxHK=eye,
        feed_forward_norm_D=ones,
        gate_IxD=torch.zeros(1, 2, dtype=torch.float64),
        up_IxD=torch.zeros(1, 2, dtype=torch.float64),
        down_DxI=torch.zeros(2, 1, dtype=torch.float64),
    )
    return ReferenceWeights(
        embedding_VD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]], dtype=torch.float64),
        layers=(layer,),
        final_norm_D=ones,
        output_embedding_VD=eye,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        norm_epsilon=0.0,
        inverse_frequencies=ones[:1],
    )


def unit(x: complex) -> complex:
    """Divide the pair by its root mean square: |result| is sqrt(2)."""
    return x / abs(x) * math.sqrt(2)


def shares_by_hand(query: tuple[complex, float], keys: list[tuple[complex, float, float]]) -> list[float]:
    """Give each key's share: a pair is a complex number, so a rotation by a position is a product with exp(i position).

    Args:
        query: layer input and position.
        keys: layer input, position and bias of each key.
    """
    x, at = query
    scores = [
        (unit(x) * (unit(k) * complex(math.cos(p - at), math.sin(p - at))).conjugate()).real / math.sqrt(2) + bias
        for k, p, bias in keys
    ]
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


def attend_by_hand(query: tuple[complex, float], keys: list[tuple[complex, float, float]]) -> complex:
    """Mix layer inputs by their shares."""
    return sum(share * unit(k) for share, (k, _, _) in zip(shares_by_hand(query, keys), keys, strict=True))


def normed(values: list[complex]) -> Tensor:
    """Give what the final norm makes of layer outputs."""
    return torch.tensor([[unit(x).real, unit(x).imag] for x in values], dtype=torch.float64)


X, Y, Z = 1 + 0j, 0 + 1j, 1 + 2j  # embeddings of the tokens 0, 1 and 2
PROMPT = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
P = 1 - 1j


def test_bswa_three_tokens_equals_formula() -> None:
    """Catches wrong rotation, scale, causality or memory segments: 2 blocks of 2, the second sees all of the first."""
    config = FamConfig(block_size=2, fam_length=0, num_memory_segments=1)
    result = run_reference(one_pair_weights(), config, torch.tensor([0, 1, 2]))
    expected = [
        X + unit(X),
        Y + attend_by_hand((Y, 1), [(X, 0, 0), (Y, 1, 0)]),
        Z + attend_by_hand((Z, 2), [(X, 0, 0), (Y, 1, 0), (Z, 2, 0)]),
    ]
    torch.testing.assert_close(result.hidden, normed(expected), **EXACT)


@pytest.mark.parametrize("query_position", ["written", "current"])
def test_fam_two_blocks_equals_formula(query_position: Any) -> None:
    """Catches any slip in Algorithm 2: what the FAM sees and where it is, the zero residual, then the real one."""
    config = FamConfig(
        fam_key_bias=0.0, block_size=2, fam_length=1, num_memory_segments=0, fam_query_position=query_position
    )
    result = run_reference(one_pair_weights(), config, torch.tensor([0, 1, 2, 0, 1]), initial=PROMPT)
    shift = 0 if query_position == "written" else 2
    # The FAM read in a block is one position before it: -1, then 1, then 3.
    first = attend_by_hand((P, -1 + shift), [(P, -1, 0), (X, 0, 0), (Y, 1, 0)])
    second = first + attend_by_hand((first, 1 + shift), [(first, 1, 0), (Z, 2, 0), (X, 3, 0)])
    for fam, value in zip(result.fams, [P, first, second], strict=True):
        torch.testing.assert_close(fam, torch.tensor([[[value.real, value.imag]]], dtype=torch.float64), **EXACT)
    expected = [
        X + attend_by_hand((X, 0), [(P, -1, 0), (X, 0, 0)]),
        Y + attend_by_hand((Y, 1), [(P, -1, 0), (X, 0, 0), (Y, 1, 0)]),
        Z + attend_by_hand((Z, 2), [(first, 1, 0), (Z, 2, 0)]),
        X + attend_by_hand((X, 3), [(first, 1, 0), (Z, 2, 0), (X, 3, 0)]),
        Y + attend_by_hand((Y, 4), [(second, 3, 0), (Y, 4, 0)]),
    ]
    torch.testing.assert_close(result.hidden, normed(expected), **EXACT)


@pytest.mark.parametrize("residual", ["previous", "none", "initial"])
@pytest.mark.parametrize("query", ["previous", "initial"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_gated_two_blocks_equal_formula(query: Any, residual: Any, is_saved: bool) -> None:
    """Catches a gate by the wrong keys' share, in the first update of a reading, or not in that of a saved FAM."""
    config = FamConfig(
        fam_key_bias=0.0,
        block_size=2,
        fam_length=1,
        num_memory_segments=0,
        fam_update="gated",
        fam_query=query,
        fam_residual=residual,
    )
    saved, ids = torch.tensor([[[-1.0, 3.0]]], dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    result = run_reference(one_pair_weights(), config, ids, initial=PROMPT, saved_fam=saved if is_saved else None)
    fam = -1 + 3j if is_saved else P
    for start, (first, second) in ((0, (X, Y)), (2, (Z, X))):
        asking = fam if query == "previous" else P
        seen = [(fam, start - 1, 0), (first, start, 0), (second, start + 1, 0)]
        left_out = residual == "none" or (residual == "previous" and start == 0 and not is_saved)
        value = attend_by_hand((asking, start + 1), seen)
        value += 0 if left_out else fam if residual == "previous" else P
        share = sum(shares_by_hand((asking, start + 1), seen)[1:])
        fam = value if start == 0 and not is_saved else fam + share * (value - fam)
        found = result.fams[1 + start // 2]
        torch.testing.assert_close(found, torch.tensor([[[fam.real, fam.imag]]], dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("update", ["paper", "gated"])
def test_new_value_goes_up_to_the_next_layer(update: Any) -> None:
    """Catches a value that stays in its layer, the gate of the layer below, or a lowest FAM that moves.

    In the first block layer 1 takes over what layer 0 made; the layers below are those of a model of one layer.
    """
    options: dict[str, Any] = {"fam_update": update, "fam_query": "initial", "fam_residual": "initial"}
    same = run(8, **options)
    moved = run(8, **options, fam_feeds="next")
    for fam in moved.fams[1:]:
        torch.testing.assert_close(fam[0], moved.fams[0][0], **EXACT)
    torch.testing.assert_close(moved.fams[1][1], same.fams[1][0], **EXACT)
    assert (moved.fams[2][1] - moved.fams[1][1]).abs().max() > 1e-3


def test_layer_without_fam_carries_rows_up() -> None:
    """Catches rows that jump over a layer: layer 1 sees the block with them, as with a FAM of no key in sight."""
    options: dict[str, Any] = {"fam_residual": "initial", "fam_query": "initial", "fam_feeds": "next"}
    result = run(4, num_layers=3, fam_layers=(0, 2), **options)
    weights = ReferenceWeights.from_llama(make_tiny_llama(3)).to(torch.float64)
    config = FamConfig(**{**BASE, **options}, fam_layers=(0, 2))
    hidden = weights.embedding_VD[random_ids(4)]
    key_positions, query_positions = fam_positions(config, 0)
    rows = result.fams[0][0]
    for layer_idx in (0, 1):
        layer = weights.layers[layer_idx]
        seen = make_keys(weights, layer, hidden, [0.0, 1.0, 2.0, 3.0])
        fam_keys = make_keys(weights, layer, rows, key_positions) if layer_idx == 0 else []
        attended = [
            torch.stack(
                [
                    attend(weights, one, position, fam_keys + (seen[: place + 1] if is_causal else seen))
                    for place, (one, position) in enumerate(
                        zip(make_queries(weights, layer, inputs), positions, strict=True)
                    )
                ]
            )
            @ layer.output_DxHK.T
            + inputs
            for inputs, positions, is_causal in (
                (hidden, [0.0, 1.0, 2.0, 3.0], True),
                (rows, query_positions, False),
            )
        ]
        hidden, rows = (feed_forward(weights, layer, one) + one for one in attended)
    torch.testing.assert_close(result.fams[1][2], rows, **EXACT)


def test_options_of_third_block_equal_formula() -> None:
    """Catches sinks, the window, older FAMs or the bias at a wrong place: all at once in one query."""
    config = FamConfig(
        block_size=2,
        fam_length=1,
        num_memory_segments=1,
        num_sink_tokens=1,
        window=2,
        num_previous_fams=2,
        fam_key_bias=-0.7,
    )
    result = run_reference(one_pair_weights(), config, torch.tensor([0, 1, 2, 0, 1]), initial=PROMPT)
    first, second = (complex(*fam[0, 0].tolist()) for fam in result.fams[1:])
    # Block 2 starts at 4; its memory segment holds 2 and 3, and a window of 2 hides the token at 2.
    seen = [(X, 1, 0), (X, 3, 0), (first, 1, -0.7), (second, 3, -0.7), (Y, 4, 0)]
    expected = normed([Y + attend_by_hand((Y, 4), seen)])
    torch.testing.assert_close(result.hidden[4:], expected, **EXACT)


def test_fam_update_ignores_bias_window_sinks_and_segments() -> None:
    """Catches token-only choices that leak into the FAM's own update; one layer, so that inputs are embeddings."""
    plain = run(12, num_layers=1, num_memory_segments=0)
    for options in ({"fam_key_bias": -3.0}, {"window": 1}, {"num_sink_tokens": 2}, {"num_memory_segments": 2}):
        for fam, expected in zip(run(12, num_layers=1, **options).fams, plain.fams, strict=True):
            torch.testing.assert_close(fam, expected, **EXACT)


@pytest.mark.parametrize(("block_size", "num_memory_segments"), [(64, 0), (5, 6)])
def test_wide_window_without_fam_equals_transformers(block_size: int, num_memory_segments: int) -> None:
    """Catches any difference from the model's own forward: outputs and all gradients."""
    model = make_tiny_llama(3)
    ids = random_ids(33)
    config = FamConfig(block_size=block_size, fam_length=0, num_memory_segments=num_memory_segments)
    result = run_reference(ReferenceWeights.from_llama(model), config, ids)
    weighting = random_rows(*result.logits.shape)
    (result.logits * weighting).mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(result.logits, logits, rtol=0, atol=2e-5)
    (logits * weighting).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_positions_of_fam_paper_example() -> None:
    """Catches a FAM at another place than in section B.2.1: B = 4, F = 2, written by the block m ... m + 3."""
    m = 20
    last = FamConfig(fam_key_bias=0.0, block_size=4, fam_length=2, fam_query_position="written")
    assert fam_positions(last, m + 4) == ([m + 2, m + 3], [m + 2, m + 3])
    key, query = fam_positions(last.replace(fam_position="fractional"), m + 4)
    assert key == query == pytest.approx([m + 3 + 1 / 3, m + 3 + 2 / 3])
    assert fam_positions(last.replace(fam_position="zero"), m + 4) == ([0, 0], [0, 0])
    current = last.replace(fam_query_position="current")
    assert fam_positions(current, m + 4) == ([m + 2, m + 3], [m + 6, m + 7])
    key, query = fam_positions(current.replace(fam_position="fractional"), m + 4)
    assert query == pytest.approx([m + 7 + 1 / 3, m + 7 + 2 / 3])
    assert fam_positions(current.replace(fam_position="zero"), m + 4) == ([0, 0], [0, 0])
    assert fam_positions(current, 0) == ([-2, -1], [2, 3])


def test_first_update_residual_is_zero_then_added() -> None:
    """Catches a first update that carries F_0, or one that drops a saved FAM: layer 0 shows the difference whole."""
    zero, added = run(4, num_layers=1), run(4, num_layers=1, zero_first_residual=False)
    weights = ReferenceWeights.from_llama(make_tiny_llama(1)).to(torch.float64)
    from_saved = run(4, num_layers=1, saved_fam=zero.fams[0])
    torch.testing.assert_close(from_saved.fams[1], added.fams[1], **EXACT)
    assert (zero.fams[1] - added.fams[1]).abs().max() > 0.1
    # A prefix of zeros leaves nothing to add, so both agree.
    config = FamConfig(fam_key_bias=0.0, block_size=4, fam_length=2, fam_init="prefix")
    runs = [
        run_reference(
            weights, config.replace(zero_first_residual=value), random_ids(4), initial=torch.zeros(1, 2, 32).double()
        )
        for value in (True, False)
    ]
    torch.testing.assert_close(runs[0].fams[1], runs[1].fams[1], **EXACT)


def test_prompt_enters_first_layer_as_it_is() -> None:
    """Catches an initial FAM that is not the prompt at layer 0, or that depends on the tokens."""
    one, other = run(6), run(6, seed=1)
    torch.testing.assert_close(one.fams[0][0], random_rows(2, 32, seed=7).double(), **EXACT)
    torch.testing.assert_close(one.fams[0], other.fams[0], **EXACT)
    assert (one.fams[1] - other.fams[1]).abs().max() > 0.1


def test_prefix_enters_every_layer_as_it_is() -> None:
    """Catches a prefix that goes up through the layers."""
    torch.testing.assert_close(run(6, fam_init="prefix").fams[0], random_rows(2, 2, 32, seed=7).double(), **EXACT)


@pytest.mark.parametrize("fam_position", ["last", "fractional"])
@pytest.mark.parametrize("fam_query_position", ["written", "current"])
def test_common_offset_changes_nothing(fam_position: Any, fam_query_position: Any) -> None:
    """Catches an absolute position that does not move with the offset. float64 angles at 10^7 err by 1e-9 each."""
    options: dict[str, Any] = {"fam_position": fam_position, "fam_query_position": fam_query_position}
    options |= {"num_previous_fams": 2, "num_sink_tokens": 1, "window": 6}
    near, far = run(**options), run(**options, position_offset=10_000_000)
    torch.testing.assert_close(near.logits, far.logits, rtol=0, atol=1e-6)


def test_common_offset_changes_position_zero() -> None:
    """Catches a FAM at position zero that moves with the text."""
    near, far = run(fam_position="zero"), run(fam_position="zero", position_offset=1000)
    assert (near.logits - far.logits).abs().max() > 1e-2


def test_no_token_sees_the_future() -> None:
    """Catches a key that is seen too early; the FAM of a block must not reach that block."""
    options: dict[str, Any] = {"num_previous_fams": 2, "num_sink_tokens": 2, "window": 5}
    ids = random_ids(14)
    whole = run(input_ids=ids, **options).logits
    for cut in range(1, 14):
        changed = torch.cat([ids[:cut], (ids[cut:] + 1) % 61])
        torch.testing.assert_close(run(input_ids=changed, **options).logits[:cut], whole[:cut], **EXACT)
        torch.testing.assert_close(run(input_ids=ids[:cut], **options).logits, whole[:cut], **EXACT)


def test_incomplete_block_writes_no_fam() -> None:
    """Catches a FAM made from part of a block."""
    assert [len(run(num_tokens).fams) for num_tokens in (1, 3, 4, 5, 8)] == [1, 1, 2, 2, 3]


def test_fam_length_zero_has_no_fam() -> None:
    """Catches FAM rows in BSWA."""
    assert all(fam.shape == (2, 0, 32) for fam in run(fam_length=0).fams)


CHANGES: list[tuple[dict[str, Any], int]] = [
    # The changed fields, and the first token (of blocks of 4) whose logits feel them.
    ({"fam_length": 0}, 0),
    ({"fam_length": 3}, 0),
    ({"num_memory_segments": 0}, 4),
    ({"num_memory_segments": 2}, 8),
    ({"window": 3}, 3),
    ({"num_previous_fams": 2}, 4),
    ({"num_previous_fams": 3}, 4),
    ({"fam_position": "fractional"}, 0),
    ({"fam_position": "zero"}, 0),
    ({"fam_query_position": "written"}, 4),
    ({"fam_init": "prefix"}, 0),
    ({"zero_first_residual": False}, 4),
    ({"fam_copy": False}, 8),
    ({"fam_update": "gated"}, 8),
    ({"fam_query": "initial"}, 8),
    ({"fam_residual": "none"}, 8),
    ({"fam_residual": "initial"}, 4),
    ({"fam_feeds": "next"}, 4),
    ({"num_sink_tokens": 1}, 8),
    ({"fam_layers": (0,)}, 0),
    ({"fam_layers": (1,)}, 0),
    ({"fam_norm_bound": 0.1}, 4),
    ({"fam_key_bias": -1.0}, 0),
]


@pytest.mark.parametrize(("changes", "first_token"), CHANGES, ids=str)
def test_field_changes_logits_from_its_first_token_on(changes: dict[str, Any], first_token: int) -> None:
    """Catches a field that does nothing, or one that is felt too early."""
    base, changed = run().logits, run(**changes).logits
    difference = (base - changed).abs().amax(dim=1)
    assert bool((difference[:first_token] < 1e-9).all())
    assert difference[first_token] > 1e-6


def test_block_size_changes_logits() -> None:
    """Catches a block size that is not the boundary: blocks of 5 differ from blocks of 4 from token 4 on."""
    difference = (run().logits - run(block_size=5).logits).abs().amax(dim=1)
    assert bool((difference[:4] < 1e-9).all())
    assert difference[4] > 1e-6


def test_stop_gradient_changes_gradients_alone() -> None:
    """Catches a cut that changes outputs, or none: the last token's gradient to the first block's embeddings."""
    grads = {}
    logits = {}
    for stop_gradient in (False, True):
        model = make_tiny_llama(2)
        config = FamConfig(
            block_size=4, fam_length=0, num_memory_segments=1, num_sink_tokens=1, stop_gradient=stop_gradient
        )
        ids = torch.arange(8)
        result = run_reference(ReferenceWeights.from_llama(model), config, ids, dtype=torch.float64)
        result.logits[-1].pow(2).sum().backward()
        grad = model.model.embed_tokens.weight.grad
        assert grad is not None
        grads[stop_gradient], logits[stop_gradient] = grad[:8], result.logits
    torch.testing.assert_close(logits[True], logits[False], **EXACT)
    assert bool((grads[True][:4] == 0).all())
    assert bool((grads[True][4:].abs().amax(1) > 0).all())
    assert bool((grads[False].abs().amax(1) > 0).all())


def test_norm_bound_scales_long_rows_alone() -> None:
    """Catches a bound on the initial FAM, on short rows, or to another norm."""
    free = run(8, num_layers=1).fams
    size = free[1].pow(2).mean(-1).sqrt()
    bound = float(size.detach().mean())
    bounded = run(8, num_layers=1, fam_norm_bound=bound).fams
    torch.testing.assert_close(bounded[0], free[0], **EXACT)
    expected = free[1] * torch.clamp(bound / size, max=1)[..., None]
    torch.testing.assert_close(bounded[1], expected, **EXACT)
    assert bool((size > bound).any())
    assert bool((size < bound).any())


def test_static_summary_takes_no_residual_and_asks_with_initial_fam() -> None:
    """Catches a SUM FAM whose query is the previous FAM: with a saved FAM the initial one still queries."""
    saved = random_rows(1, 2, 32, seed=3).double()
    one = run(4, num_layers=1, fam_copy=False, saved_fam=saved)
    other = run(4, num_layers=1, fam_copy=False, saved_fam=saved, zero_first_residual=False)
    torch.testing.assert_close(one.fams[1], other.fams[1], **EXACT)
    copied = run(4, num_layers=1, saved_fam=saved)
    assert (one.fams[1] - copied.fams[1]).abs().max() > 0.1


def test_layers_without_fam_hold_zeros() -> None:
    """Catches FAM rows on layers that carry none."""
    fams = run(9, fam_layers=(1,)).fams
    assert all(bool((fam[0] == 0).all()) for fam in fams)
    assert all(bool((fam[1] != 0).any()) for fam in fams)


def test_fam_carries_first_block_without_segments() -> None:
    """Catches a loop that is not closed: after many blocks the first token still reaches the last logits."""
    ids = random_ids(30)
    changed = ids.clone()
    changed[0] = (changed[0] + 1) % 61
    for fam_length, reaches in ((2, True), (0, False)):
        options: dict[str, Any] = {"fam_length": fam_length, "num_memory_segments": 0}
        difference = run(input_ids=ids, **options).logits[-1] - run(input_ids=changed, **options).logits[-1]
        assert bool((difference.abs() > 1e-9).any()) is reaches


def test_wrong_shapes_are_refused() -> None:
    """Catches silent broadcasting of a prompt or a saved FAM."""
    weights = ReferenceWeights.from_llama(make_tiny_llama(2))
    config = FamConfig(**BASE)
    with pytest.raises(TransformerFamError, match=r"initial has the shape None, required is \(2, 32\)"):
        run_reference(weights, config, random_ids(3))
    with pytest.raises(TransformerFamError, match=r"required is \(2, 2, 32\) for fam_init='prefix'"):
        run_reference(weights, config.replace(fam_init="prefix"), random_ids(3), initial=random_rows(2, 32))
    with pytest.raises(TransformerFamError, match="saved_fam has the shape"):
        run_reference(weights, config, random_ids(3), initial=random_rows(2, 32), saved_fam=random_rows(1, 2, 32))
    with pytest.raises(TransformerFamError, match=r"input_ids has the shape \(0,\)"):
        run_reference(weights, config, random_ids(0), initial=random_rows(2, 32))


def test_biases_are_refused() -> None:
    """Catches a model whose biases the reference would leave out."""
    model = make_tiny_llama(1)
    model.config.attention_bias = True
    with pytest.raises(UnsupportedModelError, match="attention_bias True"):
        ReferenceWeights.from_llama(model)
