"""The converted model against the reference: outputs and gradients, for every choice, chunking, batch and phase.

The reference runs in float64 and the converted model in float32, so every difference is the fast path's own rounding.
On these models (width 32, 2 layers, sharp attention), over 300 drawn configurations, it stayed below 8e-6 of the
largest logit and, for gradients, below 3e-5 of the largest entry of the same parameter (or of a hundredth of the
largest of all parameters); the limits leave a factor of five. A wrong key, position or residual shows far above.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fast_path import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, assert_near, take_gradients, turned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import VOCABULARY, make_tiny_llama, random_ids, random_rows
from torch import Tensor

from transformerfam.config import UPDATE_PRESETS, FamConfig
from transformerfam.errors import TransformerFamError
from transformerfam.fam.convert import convert, fam_parameters
from transformerfam.fam.memory import memory_of
from transformerfam.reference.fam import ReferenceResult, ReferenceWeights, run_reference

NUM_LAYERS = 2
BASE: dict[str, Any] = {"fam_key_bias": 0.0, "block_size": 4, "fam_length": 2, "num_memory_segments": 1}


def make_converted(config: FamConfig, num_layers: int = NUM_LAYERS, seed: int = 0) -> Any:
    """Convert a tiny random model and draw its initial FAM, so that rows differ and matter."""
    model: Any = convert(make_tiny_llama(num_layers, seed=seed), config)
    with torch.no_grad():
        for rows in fam_parameters(model):
            rows.copy_(random_rows(*rows.shape, seed=seed + 1))
    return model


def reference_of(model: Any, ids: Tensor, **options: Any) -> ReferenceResult:
    """Run the reference on the parameters of a converted model."""
    rows = fam_parameters(model)
    initial = rows[0] if rows else None
    weights = ReferenceWeights.from_llama(model)
    return run_reference(weights, model.fam_config, ids, initial=initial, dtype=torch.float64, **options)


def random_fam(model: Any, *sizes: int) -> Tensor:
    """Draw saved FAMs, as wide as the model's are."""
    return random_rows(*sizes, memory_of(model).fam_width(32), seed=9)


def run_chunks(model: Any, ids: Tensor, state: Any, splits: list[int], mask: Tensor | None = None) -> Tensor:
    """Feed columns of `(B, T)` ids in chunks cut at `splits` and join the logits."""
    cuts = [0, *sorted({cut for cut in splits if 0 < cut < ids.shape[1]}), ids.shape[1]]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        chunk_mask = None if mask is None else mask[:, start:stop]
        parts.append(model(input_ids=ids[:, start:stop], attention_mask=chunk_mask, past_key_values=state).logits)
    return torch.cat(parts, dim=1)


def assert_matches_reference(
    model: Any,
    rows: list[Tensor],
    *,
    splits: list[int] | None = None,
    padding_side: str = "right",
    saved_fam: Tensor | None = None,
    position_offset: int = 0,
) -> None:
    """Compare logits, FAMs and all gradients of a padded batch with the reference of every row alone."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for row, content in enumerate(rows):
        place = slice(0, len(content)) if padding_side == "right" else slice(width - len(content), width)
        ids[row, place], mask[row, place] = content, 1
    weighting = random_rows(len(rows), width, VOCABULARY, seed=5)
    is_padded = not bool(mask.all())

    state = model.init_state(len(rows), fam=saved_fam, position_offset=position_offset)
    logits = run_chunks(model, ids, state, splits or [], mask if is_padded else None)
    (logits * weighting * mask[..., None]).sum().backward()
    fast_grads = take_gradients(model)
    assert state.row_lengths == tuple(len(row) for row in rows)

    total = torch.zeros((), dtype=torch.float64)
    for row, content in enumerate(rows):
        own_fam = saved_fam[:, row] if saved_fam is not None and saved_fam.ndim == 4 else saved_fam
        own_fam = None if own_fam is None else turned(model, own_fam, -1)
        result = reference_of(model, content, saved_fam=own_fam, position_offset=position_offset)
        places = mask[row].bool()
        assert_near(logits[row, places], result.logits, LOGITS_TOLERANCE, f"logits of row {row}")
        if model.fam_config.fam_length:
            assert_near(state.fams[:, row], turned(model, result.fams[-1]), LOGITS_TOLERANCE, f"FAM of row {row}")
        total = total + (result.logits * weighting[row, places]).sum()
    total.backward()
    grads = take_gradients(model)
    floor = 0.01 * max(float(grad.abs().max()) for grad in grads.values())  # a query of one key has no gradient
    for name, required in grads.items():
        assert_near(fast_grads[name], required, GRADIENT_TOLERANCE, f"gradient of {name}", floor)


GATED = UPDATE_PRESETS["gated_rows"]
SLOTS = UPDATE_PRESETS["gated_slots"]
BLOCK = UPDATE_PRESETS["gated"]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"fam_length": 0},
    {"fam_length": 0, "num_memory_segments": 0},
    {"fam_length": 0, "num_memory_segments": 3},
    {"fam_length": 4},
    {"fam_length": 1, "block_size": 1},
    {"block_size": 3},
    {"num_memory_segments": 0},
    {"num_memory_segments": 2},
    {"stop_gradient": True},
    {"stop_gradient": True, "num_sink_tokens": 2},
    {"stop_gradient": True, "num_previous_fams": 3},
    {"window": 1},
    {"window": 4},
    {"window": 6, "num_sink_tokens": 1, "num_memory_segments": 2},
    {"num_previous_fams": 2},
    {"num_previous_fams": 3, "num_memory_segments": 0},
    {"num_previous_fams": 3, "fam_position": "fractional"},
    {"num_previous_fams": 3, "fam_position": "zero"},
    {"fam_position": "fractional"},
    {"fam_position": "fractional", "fam_query_position": "written"},
    {"fam_position": "zero"},
    {"fam_position": "zero", "fam_query_position": "written"},
    {"fam_query_position": "written"},
    {"fam_init": "prefix"},
    {"fam_init": "prefix", "fam_layers": (1,)},
    {"zero_first_residual": False},
    {"fam_copy": False},
    {"fam_copy": False, "fam_query_position": "written", "fam_init": "prefix"},
    {"fam_copy": False, "fam_position": "fractional", "zero_first_residual": False},
    {"fam_copy": False, "fam_position": "zero", "num_previous_fams": 2},
    {"fam_copy": False, "fam_layers": (0,), "fam_norm_bound": 0.3},
    {"fam_residual": "none", "stop_gradient": True},
    {"fam_residual": "initial", "fam_query_position": "written"},
    {"fam_query": "initial", "zero_first_residual": False},
    {"fam_query": "initial", "fam_residual": "initial", "fam_norm_bound": 0.5},
    {"fam_feeds": "next"},
    {"fam_feeds": "next", "fam_query": "initial", "fam_residual": "initial", "fam_init": "prefix"},
    {"fam_update": "gated"},
    {"fam_update": "gated", "zero_first_residual": False, "fam_length": 3, "num_memory_segments": 2},
    {"fam_update": "gated", "fam_residual": "none", "num_previous_fams": 2},
    {"fam_update": "gated", "fam_residual": "initial", "window": 3, "num_sink_tokens": 2},
    {"fam_update": "gated", "fam_query": "initial", "fam_residual": "none", "fam_position": "fractional"},
    {"fam_update": "gated", "fam_query": "initial", "fam_layers": (1,), "fam_norm_bound": 0.5},
    {"fam_update": "gated", "fam_feeds": "next", "fam_position": "zero"},
    {"fam_update": "gated", "fam_feeds": "next", "fam_residual": "none", "fam_key_bias": -1.0},
    GATED,
    GATED | {"num_sink_tokens": 2, "num_memory_segments": 0, "fam_length": 4},
    GATED | {"fam_init": "prefix", "fam_query_position": "written"},
    GATED | {"block_size": 1, "fam_length": 1},
    SLOTS,
    SLOTS | {"fam_update": "paper", "fam_share": "row"},
    SLOTS | {"fam_share": "row", "num_sink_tokens": 2, "num_memory_segments": 2, "fam_length": 3},
    SLOTS | {"fam_query_position": "written", "num_previous_fams": 3},
    SLOTS | {"fam_position": "fractional", "num_memory_segments": 0, "fam_key_bias": -1.0},
    SLOTS | {"block_size": 1, "fam_length": 1, "window": 3},
    BLOCK,
    BLOCK | {"fam_share_threshold": 0.0},
    BLOCK | {"fam_share_threshold": 0.8, "fam_share": "row"},
    {"fam_update": "gated", "fam_share_threshold": 0.75},
    GATED | {"fam_share_threshold": 0.7},
    BLOCK | {"fam_update": "paper", "fam_share": "row", "fam_share_threshold": 0.0},
    BLOCK | {"fam_share": "row", "num_sink_tokens": 2, "num_memory_segments": 2, "fam_length": 3, "fam_layers": (1,)},
    BLOCK | {"fam_query_position": "written", "num_previous_fams": 3},
    BLOCK | {"fam_position": "fractional", "num_memory_segments": 0, "fam_key_bias": -1.0},
    BLOCK | {"block_size": 1, "fam_length": 1, "window": 3},
    {"num_sink_tokens": 1},
    {"num_sink_tokens": 4, "num_memory_segments": 0},
    {"num_sink_tokens": 3, "num_memory_segments": 2, "fam_length": 0},
    {"fam_layers": (0,)},
    {"fam_layers": (1,), "num_previous_fams": 2},
    {"fam_norm_bound": 0.5},
    {"fam_key_bias": -2.0},
    {"fam_key_bias": -2.0, "num_previous_fams": 2},
    {"fam_starts_empty": True},
    {"fam_starts_empty": True, "num_previous_fams": 3, "num_sink_tokens": 2},
    GATED | {"fam_starts_empty": True, "num_memory_segments": 0},
    SLOTS | {"fam_starts_empty": True, "num_previous_fams": 2, "window": 3},
    BLOCK | {"fam_starts_empty": True, "num_sink_tokens": 2, "num_memory_segments": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_option_matches_reference_over_several_blocks(options: dict[str, Any]) -> None:
    """Catches any choice that the fast path takes otherwise than the algorithm: outputs, FAMs, gradients."""
    model = make_converted(FamConfig(**{**BASE, **options}))
    assert_matches_reference(model, [random_ids(14)], splits=[6, 7])


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 21])
@pytest.mark.parametrize(
    "options", [{}, {"fam_length": 0}, {"fam_copy": False, "num_sink_tokens": 1}, GATED, SLOTS, BLOCK], ids=str
)
def test_length_matches_reference(options: dict[str, Any], num_tokens: int) -> None:
    """Catches an error at the edge of a block: lengths 1, B - 1, B, B + 1 and several blocks, at once."""
    assert_matches_reference(make_converted(FamConfig(**{**BASE, **options})), [random_ids(num_tokens)])


@pytest.mark.parametrize("zero_first_residual", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"fam_copy": False}, {"fam_update": "gated"}, GATED, GATED | {"fam_residual": "previous"}, SLOTS, BLOCK],
    ids=str,
)
@pytest.mark.parametrize("is_shared", [True, False])
def test_saved_fam_matches_reference(is_shared: bool, options: dict[str, Any], zero_first_residual: bool) -> None:
    """Catches a saved FAM that loses its residual, queries where the initial one does, or is replaced ungated."""
    config = FamConfig(**BASE | options, zero_first_residual=zero_first_residual)
    model = make_converted(config)
    saved = random_fam(model, NUM_LAYERS, *([2] if is_shared else [2, 2]))
    assert_matches_reference(model, [random_ids(9), random_ids(6, seed=1)], saved_fam=saved)


@pytest.mark.parametrize("fam_position", ["last", "fractional", "zero"])
def test_position_offset_matches_reference(fam_position: Any) -> None:
    """Catches an offset that moves what must not move, or the reverse (B.2.2)."""
    model = make_converted(FamConfig(**BASE, fam_position=fam_position))
    assert_matches_reference(model, [random_ids(10)], position_offset=137)


@st.composite
def configurations(draw: st.DrawFn) -> FamConfig:
    """Draw any valid combination of choices, small."""
    block_size = draw(st.integers(1, 5))
    fam_length = draw(st.integers(0, min(3, block_size)))
    fam_feeds = draw(st.sampled_from(["same", "next", "slots"]))
    has_slots = fam_feeds == "slots"
    fam_update = draw(st.sampled_from(["paper", "gated"])) if fam_length else "paper"
    return FamConfig(
        block_size=block_size,
        fam_length=fam_length,
        fam_update=fam_update,
        fam_share_threshold=draw(st.sampled_from([0.0, 0.5, 0.8])) if fam_update == "gated" else 0.0,
        fam_query=draw(st.sampled_from(["below"] if has_slots else ["previous", "initial"])),
        fam_residual=draw(st.sampled_from(["below"] if has_slots else ["previous", "none", "initial"])),
        fam_feeds=fam_feeds,
        fam_share=draw(st.sampled_from(["row", "head"] if has_slots else ["row"])),
        fam_value=draw(st.sampled_from(["rows", "block"] if has_slots else ["rows"])),
        num_memory_segments=draw(st.integers(0, 3)),
        stop_gradient=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 12)),
        num_previous_fams=draw(st.integers(1, 3)),
        fam_position=draw(st.sampled_from(["last", "fractional", *([] if has_slots else ["zero"])])),
        fam_query_position=draw(st.sampled_from(["written", "current"])),
        fam_init="prompt" if has_slots else draw(st.sampled_from(["prompt", "prefix"])),
        zero_first_residual=draw(st.booleans()),
        num_sink_tokens=draw(st.integers(0, block_size)),
        fam_starts_empty=draw(st.booleans()),
        fam_layers=draw(st.sampled_from([None, None, (0,), (1,)])) if fam_feeds == "same" else None,
        fam_norm_bound=None if has_slots else draw(st.sampled_from([None, None, 0.5])),
        fam_key_bias=draw(st.sampled_from([0.0, -1.5])),
    )


def examples(test: Callable[..., None], number: int, **drawn: Any) -> Any:
    """Return a test on so many drawn examples; the fast tests take some, the slow ones more."""
    checks = settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    return checks(given(config=configurations(), padding_side=st.sampled_from(["left", "right"]), **drawn)(test))


def check_against_reference(
    config: FamConfig, lengths: list[int], splits: list[int], padding_side: str, is_saved: bool
) -> None:
    """Catches choices that disturb one another, chunk edges and rows out of step: outputs and gradients."""
    model = make_converted(config)
    rows = [random_ids(length, seed=row) for row, length in enumerate(lengths)]
    saved = random_fam(model, NUM_LAYERS, config.fam_length) if is_saved and config.fam_length else None
    assert_matches_reference(model, rows, splits=splits, padding_side=padding_side, saved_fam=saved)


ROWS = {
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=3),
    "splits": st.lists(st.integers(1, 11), max_size=3),
    "is_saved": st.booleans(),
}
test_any_configuration_matches_reference = examples(check_against_reference, 30, **ROWS)
test_many_configurations_match_reference = pytest.mark.slow(examples(check_against_reference, 150, **ROWS))


def check_in_place(config: FamConfig, lengths: list[int], splits: list[int], padding_side: str) -> None:
    """Catches state that is written wrongly in place: no gradients, any chunks, against each row read at once."""
    model = make_converted(config)
    width = max(lengths)
    ids = random_ids(len(lengths), width)
    column = torch.arange(width)
    sizes = torch.tensor(lengths)[:, None]
    mask = (column < sizes) if padding_side == "right" else (column >= width - sizes)
    with torch.no_grad():
        state = model.init_state(len(lengths))
        num_bytes = state.num_bytes
        logits = run_chunks(model, ids, state, splits, mask)
        assert state.num_bytes == num_bytes
        for row in range(len(lengths)):
            alone = model.init_state(1)
            required = model(input_ids=ids[row : row + 1, mask[row]], past_key_values=alone).logits[0]
            assert_near(logits[row, mask[row]], required, LOGITS_TOLERANCE, f"logits of row {row}")
            if config.fam_length:
                assert_near(state.fams[:, row], alone.fams[:, 0], LOGITS_TOLERANCE, f"FAM of row {row}")


SPLITS = {
    "lengths": st.lists(st.integers(1, 17), min_size=1, max_size=3),
    "splits": st.lists(st.integers(1, 16), max_size=6),
}
test_any_split_gives_same_state_and_logits_in_place = examples(check_in_place, 20, **SPLITS)
test_any_of_many_splits_gives_the_same_in_place = pytest.mark.slow(examples(check_in_place, 100, **SPLITS))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fam_length": 0, "num_sink_tokens": 2},
        {"fam_copy": False, "num_previous_fams": 2},
        GATED,
        {"fam_position": "zero", "fam_init": "prefix"},
        {"fam_position": "fractional", "fam_layers": (1,), "window": 5},
    ],
    ids=str,
)
def test_token_by_token_matches_reference(options: dict[str, Any]) -> None:
    """Catches a decoding step that misses a block's begin or end."""
    model = make_converted(FamConfig(**{**BASE, **options}))
    ids = random_ids(19)
    state = model.init_state(1)
    with torch.no_grad():
        logits = run_chunks(model, ids[None], state, list(range(1, 19)))[0]
        result = reference_of(model, ids)
    assert_near(logits, result.logits, LOGITS_TOLERANCE, "logits")


def test_token_by_token_gradients_match_reference() -> None:
    """Catches a graph that breaks between decoding steps of one block."""
    model = make_converted(FamConfig(**BASE, num_previous_fams=2, num_sink_tokens=1))
    assert_matches_reference(model, [random_ids(13)], splits=list(range(1, 13)))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_keep_their_own_phase_while_decoding(padding_side: str) -> None:
    """Catches a batch that shares one place in the block: prompts of 1 to 6 tokens, then 11 steps together."""
    model = make_converted(FamConfig(**BASE, num_previous_fams=2, num_sink_tokens=1))
    lengths = [1, 3, 4, 6]
    rows = [random_ids(length + 11, seed=length) for length in lengths]
    width = max(lengths)
    prompt = torch.zeros(4, width, dtype=torch.long)
    mask = torch.zeros(4, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if padding_side == "right" else slice(width - length, width)
        prompt[row, place], mask[row, place] = rows[row][:length], 1
    following = torch.stack([row[-11:] for row in rows])
    with torch.no_grad():
        state = model.init_state(4)
        model(input_ids=prompt, attention_mask=mask, past_key_values=state)
        logits = run_chunks(model, following, state, list(range(1, 11)))
        assert state.row_lengths == tuple(length + 11 for length in lengths)
        for row, content in enumerate(rows):
            result = reference_of(model, content)
            assert_near(logits[row], result.logits[-11:], LOGITS_TOLERANCE, f"logits of row {row}")


def test_row_of_padding_alone_stays_where_it_is() -> None:
    """Catches a row that reads padding, or that blocks the others, in a chunk that brings it nothing."""
    model = make_converted(FamConfig(**BASE))
    ids = random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 2:7] = 0
    with torch.no_grad():
        state = model.init_state(2)
        logits = run_chunks(model, ids, state, [2, 7], mask)
        required = reference_of(model, ids[1, [0, 1, 7, 8]]).logits
    assert state.row_lengths == (9, 4)
    assert_near(logits[1, [0, 1, 7, 8]], required, LOGITS_TOLERANCE, "logits of the padded row")
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fam"])
@pytest.mark.parametrize("num_key_value_heads", [1, 4])
@pytest.mark.parametrize("fam_key_bias", [-1.0, 0.0])
@pytest.mark.parametrize("options", [{}, GATED, {"fam_update": "gated"}], ids=str)
def test_attention_back_end_matches_reference(
    implementation: str, num_key_value_heads: int, fam_key_bias: float, options: dict[str, Any]
) -> None:
    """Catches a mask that one attention back end reads otherwise, groups of heads, and a gate that is left out."""
    base = make_tiny_llama(NUM_LAYERS, num_key_value_heads=num_key_value_heads)
    model: Any = convert(base, FamConfig(**BASE | options | {"fam_key_bias": fam_key_bias}))
    model.set_attn_implementation(implementation)
    if implementation == "sdpa" and options:
        with pytest.raises(TransformerFamError, match=r"fam_update is 'gated'.*set_attn_implementation\('fam'\)"):
            model(input_ids=random_ids(1, 10))
        return
    assert_matches_reference(model, [random_ids(10), random_ids(7, seed=1)], padding_side="left")
    assert_matches_reference(model, [random_ids(11, seed=2)], splits=[2, 3])


@pytest.mark.parametrize("fam_position", ["last", "fractional"])
def test_state_at_ten_million_tokens_agrees(fam_position: Any) -> None:
    """Catches positions that grow: state and block at 0 and at 10,000,000 agree to 1e-5, and with the reference."""
    model = make_converted(FamConfig(**BASE, fam_position=fam_position, num_previous_fams=2))
    ids = random_ids(26)
    with torch.no_grad():
        near = model.read(ids[:12])
        far = near.fork()
        far.num_blocks_per_row = [10_000_000 // 4]
        logits = [model(input_ids=ids[None, 12:], past_key_values=state).logits[0] for state in (near, far)]
        result = reference_of(model, ids, position_offset=10_000_000)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert_near(logits[1], result.logits[12:], LOGITS_TOLERANCE, "logits")


def test_read_equals_forward() -> None:
    """Catches a reading without logits that leaves another state."""
    model = make_converted(FamConfig(**BASE, num_sink_tokens=1))
    ids = random_ids(2, 15)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        read = model.read(ids[:, :11], attention_mask=mask[:, :11])
        forward = model.init_state(2)
        model(input_ids=ids[:, :11], attention_mask=mask[:, :11], past_key_values=forward)
        logits = [model(input_ids=ids[:, 11:], past_key_values=state).logits for state in (read, forward)]
    assert_near(logits[0], logits[1], LOGITS_TOLERANCE, "logits")
    assert_near(read.fams, forward.fams, LOGITS_TOLERANCE, "FAM")


def test_fam_dtype_changes_what_is_kept() -> None:
    """Catches a FAM kept in the model's type: rounding to 8 bits shows, and stays near the reference."""
    ids = random_ids(14)
    results = {}
    for fam_dtype in ("float32", "bfloat16", "float16"):
        model = make_converted(FamConfig(**BASE, fam_dtype=fam_dtype))
        with torch.no_grad():
            state = model.init_state(1)
            results[fam_dtype] = model(input_ids=ids[None], past_key_values=state).logits[0]
            required = reference_of(model, ids).logits
        assert state.fams.dtype == getattr(torch, fam_dtype)
    assert_near(results["float32"], required, LOGITS_TOLERANCE, "float32")
    for fam_dtype in ("bfloat16", "float16"):
        assert not torch.equal(results[fam_dtype], results["float32"])
        assert_near(results[fam_dtype], required, 0.1, fam_dtype)


def test_training_after_inference_mode() -> None:
    """Catches cached masks or angles made under inference_mode that autograd then refuses."""
    model = make_converted(FamConfig(block_size=4, fam_length=2, num_memory_segments=1, fam_key_bias=-0.25))
    with torch.inference_mode():
        model.read(random_ids(10))
    assert_matches_reference(model, [random_ids(10)])


def test_double_model_matches_reference() -> None:
    """Catches a mask or a turn that fits float32 alone; the norm of the family itself is float32."""
    model = make_converted(FamConfig(**BASE, num_previous_fams=2)).double()
    assert_matches_reference(model, [random_ids(10), random_ids(6, seed=1)])


def test_greedy_generation_matches_reference() -> None:
    """Catches a generation that reads a token twice or skips one: left-padded prompts, from nothing and a state."""
    model = make_converted(FamConfig(**BASE, num_sink_tokens=1))
    rows = [random_ids(length, seed=length) for length in (3, 5, 8)]
    prompt = torch.stack([torch.cat([torch.zeros(8 - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(8) >= 8 - len(row) for row in rows]).long()
    read = torch.stack([random_ids(6, seed=row) for row in range(3)])
    for state, heads in ((None, rows), (model.read(read), [torch.cat(pair) for pair in zip(read, rows, strict=True)])):
        generated = model.generate(
            prompt, attention_mask=mask, past_key_values=state, max_new_tokens=6, do_sample=False, pad_token_id=0
        )[:, 8:]
        for row, text in enumerate(heads):
            for token in generated[row]:
                with torch.no_grad():
                    assert int(reference_of(model, text).logits[-1].argmax()) == int(token)
                text = torch.cat([text, token[None]])
