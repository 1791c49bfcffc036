"""Every served family: equal to its base, to the algorithms, however it is read, saved and generated from."""

import copy
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_reference import FamilyReference
from tiny_families import (
    ALL_CASES,
    CASES,
    CONFIG,
    FURTHER_CASES,
    OPTIONS,
    config_of,
    draw_ids,
    every_case,
    is_at_hand,
    make_converted,
    make_tiny,
    read_in_chunks,
)
from torch._dynamo.testing import CompileCounter

from transformerfam import FamState, convert
from transformerfam.decoder.families import FAMILIES
from transformerfam.errors import UnsupportedModelError
from transformerfam.fam.compiled import compile_decoding, compile_reading
from transformerfam.fam.convert import fam_parameters, memory_of

TOLERANCE = 1e-4
at_hand = [case for case in ALL_CASES if is_at_hand(case)]
DIFFERENT = ("llama", "gemma2", "gemma3_text", "olmo2", "falcon", "deepseek_v3")
"""Families that differ the most: the fast tests go through every option with these, and through two with the others."""
UPDATES = ("default", "block", "gated", "slots")


def is_fast(case: str, options: str) -> bool:
    """Return whether the fast tests read a family with these options.

    Those that differ the most are read with all, the other cases, and the families whose layers are made of their
    parts, by the paper's update or ours in turn.
    """
    if case in FURTHER_CASES:
        return case in FAMILIES and options == UPDATES[list(FURTHER_CASES).index(case) % 2]
    return case in DIFFERENT or options == UPDATES[list(CASES).index(case) % 2]


def is_fast_in_pieces(case: str, options: str) -> bool:
    """Return whether the fast tests read a family in pieces with these options."""
    in_turn = case in CASES and list(CASES).index(case) % 2 == 0
    return (options == "block" and in_turn) or (options == "default" and case in DIFFERENT)


every_update = pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, marks=[] if is_fast_in_pieces(case, options) else pytest.mark.slow)
        for case, options in itertools.product(at_hand, UPDATES)
    ],
)


def assert_near(there: torch.Tensor, required: torch.Tensor, what: str, floor: float = 1e-3) -> None:
    error = (there.double() - required.double()).abs().max() / required.double().abs().max().clamp(min=floor)
    assert float(error) <= TOLERANCE, f"{what} off by {float(error):.1e} of the largest entry"


@pytest.mark.parametrize(
    "case", [case if case in CASES else pytest.param(case, marks=pytest.mark.slow) for case in at_hand]
)
@torch.no_grad()
def test_without_memory_and_with_a_wide_window_it_is_the_base(case: str) -> None:
    """Catches a key that is lost, turned wrongly or seen beyond a layer's own window."""
    ids = draw_ids(2, 33)
    base = make_tiny(case)
    expected = base(input_ids=ids).logits
    model = convert(base, CONFIG.replace(fam_length=0, num_memory_segments=7))
    for lengths in ([33], [3, 9, 1, 1, 1, 18]):
        logits, _ = read_in_chunks(model, ids, lengths)
        assert_near(logits, expected, f"logits in chunks {lengths}")


def case_and_options() -> Iterator[Any]:
    """Yield every case with all options."""
    for case in at_hand:
        for options in OPTIONS:
            marks = [] if is_fast(case, options) else pytest.mark.slow
            yield pytest.param(case, options, marks=marks, id=f"{options}-{case}")


@pytest.mark.parametrize(("case", "options"), list(case_and_options()))
def test_outputs_and_gradients_match_the_algorithms(case: str, options: str) -> None:
    """Catches any seam that is not where the algorithm has it: rows, cache, mask, first residual."""
    model = make_converted(case, config_of(case, options))
    ids = draw_ids(1, 18)
    windows = [layout.window for layout in memory_of(model).layouts]
    twin: Any = make_tiny(case).double()
    reference = FamilyReference(twin, model.fam_config, windows)
    initial = fam_parameters(model)[0].detach().double().requires_grad_(True)
    hidden, fams = reference.read(ids[0], initial)

    state = model.init_state(1)
    parts = [
        model.get_decoder()(input_ids=part, past_key_values=state).last_hidden_state for part in ids.split([7, 11], 1)
    ]
    found = torch.cat(parts, dim=1)[0]
    assert_near(found.detach(), hidden.detach(), "hidden states")
    assert_near(state.fams[:, 0].detach(), fams.detach(), "FAM")

    weighting = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (found * weighting).sum().backward()
    (hidden * weighting).sum().backward()
    required = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    floor = 0.01 * max(float(grad.abs().max()) for grad in required.values())
    own = dict(model.named_parameters())
    assert len(required) > 3 * 4
    for name, grad in required.items():
        assert_near(own[name].grad, grad, f"gradient of {name}", floor)
    assert_near(fam_parameters(model)[0].grad, initial.grad, "gradient of the initial FAM", floor)


@every_update
@torch.no_grad()
def test_any_split_and_any_padding_give_the_same(case: str, options: str) -> None:
    """Catches what depends on where a text is cut, and sequences of a batch that mix."""
    model = make_converted(case, config_of(case, options))
    ids = draw_ids(2, 23)
    expected, expected_state = read_in_chunks(model, ids, [23])
    for lengths in ([1] * 23, [4, 2, 11, 6]):
        logits, state = read_in_chunks(model, ids, lengths)
        assert_near(logits, expected, f"logits in chunks of {lengths}")
        assert_near(state.fams, expected_state.fams, "FAM")
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    shorter, _ = read_in_chunks(model, ids[1:, 6:], [17])
    padded = model(input_ids=ids, attention_mask=mask).logits
    assert_near(padded[0], expected[0], "logits next to padding")
    assert_near(padded[1, 6:], shorter[0], "logits of a padded sequence")


@every_case
@torch.no_grad()
def test_saved_state_goes_on_as_if_never_saved(case: str, tmp_path: Path) -> None:
    """Catches tensors of a family's own shapes that are lost or mixed up in a file."""
    model = make_converted(case)
    state = model.read(draw_ids(1, 13))
    state.save(tmp_path / "state.safetensors")
    more = draw_ids(1, 9, seed=1)
    loaded = FamState.load(tmp_path / "state.safetensors", make_converted(case))
    expected = model(input_ids=more, past_key_values=state).logits
    assert torch.equal(model(input_ids=more, past_key_values=loaded).logits, expected)


@every_case
@torch.no_grad()
def test_generating_goes_on_from_a_reading(case: str) -> None:
    """Catches `generate` that feeds a family's forward something else than new tokens."""
    model = make_converted(case)
    state = model.read(draw_ids(1, 13))
    question = draw_ids(1, 4, seed=1)
    twin, logits = state.fork(), None
    expected = []
    tokens = question
    for _ in range(8):
        logits = model(input_ids=tokens, past_key_values=twin).logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        expected.append(int(tokens))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(question, past_key_values=state, **options)
    assert found[0, 4:].tolist() == expected


@every_case
def test_conversion_keeps_weights_and_copies_read_on_their_own(case: str) -> None:
    """Catches hooks of a copy that act on the original, and weights that a probe changed."""
    base = make_tiny(case)
    model = convert(copy.deepcopy(base), CONFIG)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    ids = draw_ids(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(input_ids=ids).logits, expected)


@every_update
@torch.no_grad()
def test_every_attention_back_end_gives_the_same(case: str, options: str) -> None:
    """Catches a back end that drops a family's soft caps, sinks or masks, or the gate."""
    ids = draw_ids(2, 23)
    found = {}
    names = back_ends(case)
    if options != "default" and "fam" in names:
        names.remove("sdpa")  # which gives no weights, and is refused
    for back_end in names:
        own = {} if back_end == "fam" else {"attn_implementation": back_end}
        model = make_converted(case, config_of(case, options), **own)
        if back_end == "sdpa":
            model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == back_end
        found[back_end], _ = read_in_chunks(model, ids, [4, 19])
    for back_end, logits in found.items():
        assert_near(logits, found["eager"], f"logits by {back_end}")


@pytest.mark.parametrize(
    "case", [case if case in DIFFERENT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_first_block_of_an_empty_memory_is_the_bases(case: str) -> None:
    """Catches a memory that changes a short text, and one that stays unseen when there is something in it."""
    base, ids = make_tiny(case), draw_ids(2, 12)
    model = make_converted(case, CONFIG.replace(fam_starts_empty=True))
    with torch.no_grad():
        expected = base(input_ids=ids[:, :5]).logits
        found = model(input_ids=ids).logits
        state = model.init_state(2)
        in_pieces = torch.cat(
            [model(input_ids=part, past_key_values=state).logits for part in ids.split([2, 7, 3], 1)], 1
        )
        other = model.init_state(2, fam=model.read(draw_ids(2, 5, seed=1)).fams)
        model(input_ids=ids[:, :5], past_key_values=other)
        of_another = model(input_ids=ids[:, 5:], past_key_values=other).logits
    assert_near(found[:, :5], expected, "logits of the first block")
    assert_near(in_pieces, found, "logits in pieces")
    assert not torch.allclose(of_another, found[:, 5:], atol=1e-4)


COMPILED = [
    *((case, "default") for case in CASES),
    *((case, "default") for case in at_hand if case in FURTHER_CASES),
    *((case, options) for case in DIFFERENT for options in ("gated", "slots", "block")),
]
"""Pairs of a family and a configuration; the fast tests compile some of them."""


def is_fast_when_compiled(case: str, options: str, compile_step: Any) -> bool:
    """Return whether the fast tests compile a pair: blocks of a family that differs much, in our update, and tokens
    one by one."""
    if compile_step is compile_decoding:
        return case == "deepseek_v3" and options == "gated"
    return case == "gemma3_text" and options == "slots"


@pytest.mark.parametrize(
    ("compile_step", "case", "options"),
    [
        pytest.param(*pair, marks=[] if is_fast_when_compiled(*pair[1:], pair[0]) else pytest.mark.slow)
        for pair in ((step, *pair) for step in (compile_reading, compile_decoding) for pair in COMPILED)
    ],
)
@torch.no_grad()
def test_compiled_steps_match_and_are_compiled_once(case: str, options: str, compile_step: Callable[..., None]) -> None:
    """Catches a family's layers that break the graph, or shapes that change from block to block."""
    plain, compiled = (make_converted(case, config_of(case, options)) for _ in range(2))
    torch.compiler.reset()
    counter = CompileCounter()
    compile_step(compiled, batch_size=2, backend=counter)
    ids, lengths = draw_ids(2, 33), [3, *[1] * 12, 18]
    expected, expected_state = read_in_chunks(plain, ids, lengths)
    found, state = read_in_chunks(compiled, ids, lengths)
    assert_near(found, expected, "logits")
    assert_near(state.fams, expected_state.fams, "FAM")
    assert counter.frame_count == 1


def back_ends(case: str) -> list[str]:
    """Return the attention back ends that run here and that the family's class takes."""
    model: Any = make_tiny(case)
    sdpa = ["sdpa", "fam"] if FAMILIES[case.split()[0]].has_attention_interface else ["sdpa"]
    takes_sdpa = model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None
    return ["eager", *(sdpa if takes_sdpa else [])]


def describe_families() -> str:
    """Return the table of the docs, from what the tests here go through."""
    lines = ["| family | `model_type` | since | attention back ends | what is special |", "|---|---|---|---|---|"]
    for model_type, family in FAMILIES.items():
        names = {name: None for case in ALL_CASES if case.split()[0] == model_type for name in back_ends(case)}
        lines.append(
            f"| {family.name} | `{model_type}` | {family.since} | {', '.join(names)} | {family.special or 'nothing'} |"
        )
    return "\n".join(lines) + "\n"


def test_table_of_the_docs_is_that_of_the_tests() -> None:
    """Catches a family in the docs that no test goes through; FAM_WRITE_DOCS=1 writes the table."""
    missing = [case for case in ALL_CASES if not is_at_hand(case)]
    if missing:
        pytest.skip(f"the installed transformers has no {', '.join(missing)}")
    path = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
    before, begin, rest = path.read_text().partition("<!-- table: begin -->\n")
    _, end, after = rest.partition("<!-- table: end -->\n")
    if os.environ.get("FAM_WRITE_DOCS") == "1":
        path.write_text(before + begin + describe_families() + end + after)
    else:
        assert describe_families() == rest.removesuffix(end + after)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_number_of_families_is_that_of_the_table(name: str) -> None:
    text = (Path(__file__).parents[2] / name).read_text()
    assert f"{len(FAMILIES)} families are served" in text


def test_every_served_family_has_a_case() -> None:
    assert {case.split()[0] for case in ALL_CASES} == set(FAMILIES)


WRONG_ENTRIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "norm after attention not known": ("gemma2", {"branch": "self_attn"}, "first residual seam"),
    "norm after attention and none in front": ("olmo2", {"branch": "self_attn"}, "first residual seam"),
    "factor not known": ("granite", {"branch_factor": lambda config: 1.0}, "first residual seam"),
    "parallel residual not known": (
        "gpt_neox",
        {"is_parallel": lambda config: False},
        "first residual seam",
    ),
    "part with another name": ("phi", {"is_parallel": lambda config: False}, "PhiDecoderLayer has no part 'post_att"),
    "attention with another name": ("llama", {"attention": "attention"}, "LlamaDecoderLayer has no part 'attention'"),
}


@pytest.mark.parametrize("name", WRONG_ENTRIES)
def test_family_that_differs_from_what_is_known_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a conversion that trusts the table: as in a transformers version whose layers have changed."""
    case, changes, match = WRONG_ENTRIES[name]
    model, ids = make_tiny(case), draw_ids(1, 9)
    expected = model(input_ids=ids).logits
    monkeypatch.setitem(FAMILIES, case, dataclasses.replace(FAMILIES[case], **changes))
    with pytest.raises(UnsupportedModelError, match=match):
        convert(model, CONFIG)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not hasattr(model, "read")


def test_window_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers that slide and are taken for layers that see all, however wide their window."""
    monkeypatch.setattr("transformerfam.decoder.layouts.own_windows", lambda config: [None, 4000, 4000])
    with pytest.raises(UnsupportedModelError, match="the cache seam does not fit"):
        convert(make_tiny("gemma2", sliding_window=4000), CONFIG)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "positions that depend on the length": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        },
        "'longrope' changes with the length",
    ),
    "no RoPE": ("falcon", {"alibi": True}, "has no rotary position embedding"),
    "later tokens": ("gemma3_text", {"use_bidirectional_attention": True}, "sees later tokens"),
}


def test_soft_caps_that_would_be_left_out_are_refused() -> None:
    """Catches a Gemma 2 that runs on without its soft caps, as older transformers load it."""
    model = make_tiny("gemma2")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedModelError, match="soft caps on its attention"):
        convert(model, CONFIG)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_family_cannot_do_is_refused(name: str) -> None:
    """Catches a member of a served family that is converted wrongly."""
    case, changes, match = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=match):
        convert(make_tiny(case, **changes), CONFIG)


def test_hybrid_model_names_its_layers_and_keeps_the_rest() -> None:
    """Catches local layers that carry FAM by default, and a user's choice that is ignored."""
    model = convert(make_tiny("gemma3_text"), CONFIG)
    assert model.fam_config.fam_layers == (1,)
    shapes = [tuple(layer.keys.shape) for layer in model.init_state().layers]
    local, memory = (1, 2, 5 + 5, 8), (1, 2, 5 + 2 + 5, 8)  # window - 1 and block; segment, FAM and block
    assert shapes == [local, memory, local]
    everywhere = convert(make_tiny("gemma3_text"), CONFIG.replace(fam_layers=(0, 1, 2)))
    assert [layer.fam is not None for layer in everywhere.init_state().layers] == [True] * 3
    assert convert(make_tiny("mistral"), CONFIG).fam_config.fam_layers is None
