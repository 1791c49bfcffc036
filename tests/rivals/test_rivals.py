"""Every rival against its own paper's equations as plain loops, and the promises that all of them keep."""

import itertools
from typing import Any

import pytest
import torch
from fast_path import assert_no_token_sees_the_future
from rival_reference import PLAIN
from tiny_families import ALL_CASES, CASES, EVERY_CASE, is_at_hand, make_tiny
from tiny_llama import make_tiny_llama, random_ids, random_rows
from transformers import DynamicCache

from transformerfam import FamConfig, convert
from transformerfam.decoder.cache_argument import as_cache
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError, UnsupportedModelError
from transformerfam.reference.fam import ReferenceWeights
from transformerfam.rivals import PRESETS, RIVAL_NAMES, RivalConfig, RivalState, attach, preset
from transformerfam.rivals.gated_linear import CHUNK_LENGTH

TOLERANCE = 1e-6
"""Models run in float64, where two ways of one reading differ by 1e-14; a wrong key shows at 1e-2."""

NORM_TOLERANCE = 5e-5
"""Against the plain loops: the norm of the family itself is float32, theirs is not. Differences stay below 1e-5."""

BLOCK_SIZE = 8
RECURRENT = [name for name in RIVAL_NAMES if name != "full"]
PASSED_ON = [name for name in RECURRENT if name != "autocompressor"]


def with_rival(system: str, num_layers: int = 3, **fields: Any) -> Any:
    """Return a tiny model with a rival whose parameters are drawn again, so that none is at its quiet start."""
    values = {"system": system, "block_size": BLOCK_SIZE, "num_memory_tokens": 3, "association_width": 16} | fields
    model = attach(make_tiny_llama(num_layers), RivalConfig.from_dict(values)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.get_decoder().rival.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def plain(model: Any) -> Any:
    """Return the same system as plain loops."""
    parameters = dict(model.get_decoder().rival.named_parameters())
    config = model.rival_config
    return PLAIN[config.system](ReferenceWeights.from_llama(model), parameters, config)


def check_against_plain(model: Any, ids: torch.Tensor) -> None:
    """Compare logits and gradients with those of plain loops."""
    there = model(input_ids=ids).logits[0]
    required = plain(model).logits(ids[0])
    torch.testing.assert_close(there, required, atol=NORM_TOLERANCE, rtol=1e-5)
    weights = random_rows(*there.shape, seed=3)
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    own = torch.autograd.grad((weights * there).sum(), [p for _, p in named], allow_unused=True)
    other = torch.autograd.grad((weights * required).sum(), [p for _, p in named], allow_unused=True)
    for (name, _), mine, its in zip(named, own, other, strict=True):
        zero = torch.zeros(())
        mine, its = (zero if g is None else g for g in (mine, its))
        scale = max(1.0, float(its.abs().max()))
        assert float((mine - its).abs().max()) < 1e-4 * scale, name


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 29])
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_logits_and_gradients_equal_the_papers_equations(system: str, num_tokens: int) -> None:
    """Catches any departure of a rival from its paper, in what it gives and in what it is trained by."""
    check_against_plain(with_rival(system), random_ids(1, num_tokens))


def test_gated_linear_memory_runs_through_the_chunks_of_a_segment() -> None:
    """Catches a recurrence that holds within a chunk, and not from one to the next of the same segment."""
    check_against_plain(with_rival("gated_linear", block_size=3 * CHUNK_LENGTH + 2), random_ids(1, 29))


@pytest.mark.parametrize("fields", [{"system": "infini", "use_delta_rule": False}])
def test_infini_without_delta_rule_equals_its_equation(fields: dict[str, Any]) -> None:
    """Catches a delta rule that cannot be switched off."""
    check_against_plain(with_rival(**fields), random_ids(1, 20))


def test_feedback_segment_sees_two_segments() -> None:
    """Catches segments in the wrong order, or one too few."""
    check_against_plain(with_rival("feedback_segment", num_memory_segments=2), random_ids(1, 37))


@torch.no_grad()
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_any_split_gives_the_same_logits(system: str) -> None:
    """Catches a memory that is written by a piece and not by a segment, or that does not update while it decodes."""
    model, ids = with_rival(system), random_ids(2, 37)
    whole = model(input_ids=ids).logits
    for size in (1, 5, 8):
        state = model.init_state(2)
        parts = [model(input_ids=part, past_key_values=state).logits for part in ids.split(size, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_generation_continues_what_reading_gives(system: str) -> None:
    """Catches a memory that reading has and `generate` has not."""
    model, ids = with_rival(system), random_ids(1, 21)
    state = model.read(ids)
    said = model.generate(
        random_ids(1, 2, seed=4), past_key_values=state.fork(), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, 2:]
    text = torch.cat((ids[0], random_ids(1, 2, seed=4)[0], said))
    logits = model(input_ids=text[None]).logits[0, 22:-1]
    assert torch.equal(logits.argmax(-1), said)


@torch.no_grad()
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_no_token_sees_the_future(system: str) -> None:
    """Catches a write token or a memory that reaches back into its own segment."""
    assert_no_token_sees_the_future(with_rival(system), TOLERANCE, least=100 * NORM_TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_padded_batch_gives_what_each_row_gives_alone(system: str) -> None:
    """Catches sequences of different length that share a place, and padding that is read."""
    model, lengths = with_rival(system), (37, 20, 9)
    texts = [random_ids(1, n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, 37, dtype=torch.long), torch.zeros(3, 37, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 37 - text.shape[1] :], mask[row, 37 - text.shape[1] :] = text[0], 1
    output = model(input_ids=ids, attention_mask=mask)
    state = output.past_key_values
    assert state.row_lengths == lengths
    state = state.select([2, 0, 1, 2]).select([1, 2, 0])  # rows moved, doubled and dropped
    token = random_ids(3, 11, seed=9)
    later = model(input_ids=token, past_key_values=state).logits
    for row, text in enumerate(texts):
        alone = model(input_ids=text)
        torch.testing.assert_close(output.logits[row, -text.shape[1] :], alone.logits[0], atol=TOLERANCE, rtol=0)
        expected = model(input_ids=token[row : row + 1], past_key_values=alone.past_key_values).logits
        torch.testing.assert_close(later[row : row + 1], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_save_and_load_change_nothing(system: str, tmp_path: Any) -> None:
    """Catches a part of the state that the file forgets."""
    model = with_rival(system)
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, :5] = 0
    state = model.read(random_ids(2, 29), attention_mask=mask)
    state.save(tmp_path / "state.safetensors")
    loaded = RivalState.load(tmp_path / "state.safetensors", model)
    assert loaded.row_lengths == state.row_lengths == (29, 24)
    ids = random_ids(2, 30, seed=5)
    there = model(input_ids=ids, past_key_values=loaded).logits
    assert torch.equal(there, model(input_ids=ids, past_key_values=state).logits)


def test_state_of_another_rival_or_damaged_is_refused(tmp_path: Any) -> None:
    """Catches a state that continues with the wrong memory."""
    model = with_rival("rmt")
    path = tmp_path / "state.safetensors"
    model.read(random_ids(1, 20)).save(path)
    with pytest.raises(StateMismatchError, match="num_memory_tokens is 3 there and 5 here"):
        RivalState.load(path, with_rival("rmt", num_memory_tokens=5))
    with pytest.raises(StateMismatchError, match="belongs to another model or rival"):
        with_rival("armt")(input_ids=random_ids(1, 2), past_key_values=model.init_state())
    fam = convert(make_tiny_llama(3), FamConfig(block_size=8, fam_length=3))
    with pytest.raises(StateMismatchError, match="FamState, required is a RivalState"):
        model(input_ids=random_ids(1, 2), past_key_values=fam.init_state())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match="not a readable safetensors"):
        RivalState.load(path, model)


def blocks_with_gradient(model: Any, num_blocks: int) -> list[bool]:
    """Say which segments' embeddings the last token's logits depend on, by gradient."""
    embeddings = random_rows(1, num_blocks * BLOCK_SIZE, 32).to(model.dtype).requires_grad_()
    model(inputs_embeds=embeddings).logits[0, -1].square().sum().backward()
    assert embeddings.grad is not None
    return [bool(block.abs().max() > 0) for block in embeddings.grad[0].split(BLOCK_SIZE)]


@pytest.mark.parametrize("system", [name for name in RECURRENT if name != "feedback_segment"])
def test_gradient_reaches_the_first_of_ten_segments(system: str) -> None:
    """Catches a memory that is detached between segments, as several public implementations have it."""
    assert all(blocks_with_gradient(with_rival(system), 10))


def test_gradient_of_the_feedback_segment_reaches_the_first_of_ten_segments() -> None:
    """A layer's outputs feed back into the layer itself: unlike BSWA, one segment in sight has unlimited reach."""
    assert all(blocks_with_gradient(with_rival("feedback_segment", num_layers=1), 10))


@torch.no_grad()
@pytest.mark.parametrize("system", RECURRENT)
def test_memory_is_written_and_read(system: str) -> None:
    """Catches a memory that nothing reaches, or that reaches nothing: the second segment must feel the first."""
    model, ids = with_rival(system), random_ids(1, 2 * BLOCK_SIZE)
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] + 1) % 61
    there, other = (model(input_ids=text).logits[0, BLOCK_SIZE:] for text in (ids, changed))
    assert (there - other).abs().max() > 1e-4
    state = model.read(ids[:, :BLOCK_SIZE])
    zeroed = model(input_ids=ids[:, BLOCK_SIZE:], past_key_values=state.fork().zero_memory()).logits
    assert (zeroed[0] - there).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("system", RECURRENT)
def test_memory_is_swapped_and_begun_anew_for_the_controls(system: str) -> None:
    """Catches controls that do not change the memory, or that change the current segment."""
    model = with_rival(system)
    state = model.read(random_ids(2, BLOCK_SIZE + 3))
    if state.has_memory:
        assert torch.equal(state.fork().swap_memory().carried, state.carried.roll(1, dims=1))
        assert torch.equal(state.fork().initial_memory().carried, model.init_state(2).carried)
    swapped = state.fork().swap_memory()
    for own, there in zip(state.lanes, swapped.lanes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.keys, there.keys, strict=True))
        for name, tensor in own.memory.items():
            assert torch.equal(there.memory[name], tensor.flip(0))
    with pytest.raises(TransformerFamError, match="there is one alone; read at least 2 side by side"):
        state.select([0]).swap_memory()


@torch.no_grad()
@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_carried_bytes_grow_only_where_the_system_says_so(system: str) -> None:
    """Catches a state that keeps what it should let go."""
    model = with_rival(system)
    numbers = []
    state = model.init_state()
    for part in random_ids(1, 32 * BLOCK_SIZE).split(8 * BLOCK_SIZE, dim=1):
        model.read(part, state)
        numbers.append(state.num_bytes)
    grows = system in ("full", "autocompressor")
    steps = [later - earlier for earlier, later in itertools.pairwise(numbers)]
    assert steps == [steps[0]] * 3
    assert (steps[0] > 0) == grows


@torch.no_grad()
@pytest.mark.parametrize("system", PASSED_ON)
def test_memory_handed_on_starts_another_reading(system: str) -> None:
    """Catches a memory that random state passing mixes up between its parts or its rows."""
    model, ids = with_rival(system), random_ids(3, 3 * BLOCK_SIZE)
    state = model.read(ids[:, : 2 * BLOCK_SIZE])
    rest = ids[:, 2 * BLOCK_SIZE :]
    going_on = model(input_ids=rest, past_key_values=state).logits
    fams = model.read(ids[:, : 2 * BLOCK_SIZE]).carried
    passed = model(input_ids=rest, past_key_values=model.init_state(3, carried=fams)).logits
    torch.testing.assert_close(passed, going_on, atol=TOLERANCE, rtol=0)
    mixed = model.init_state(3, carried=fams, is_saved=[True, False, True])
    logits = model(input_ids=rest, past_key_values=mixed).logits
    torch.testing.assert_close(logits[[0, 2]], going_on[[0, 2]], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits[1:2], model(input_ids=rest[1:2]).logits, atol=TOLERANCE, rtol=0)
    with pytest.raises(StateMismatchError, match=r"required is \(1, batch, 1, numbers\)"):
        model.init_state(3, carried=fams[..., :-1])


def test_growing_memory_is_not_handed_on() -> None:
    """Catches a memory of another size that would be cut off silently."""
    model = with_rival("autocompressor")
    with pytest.raises(TransformerFamError, match="no memory of fixed size"):
        _ = model.init_state().carried


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY_CASE)
def test_full_attention_gives_base_logits_in_every_family(case: str) -> None:
    """Catches a cache or a mask that does not fit a family: in pieces, full attention is the model itself."""
    ids = random_ids(2, 20)
    base = make_tiny(case)(input_ids=ids).logits
    model: Any = attach(make_tiny(case), RivalConfig(system="full", block_size=8))
    parts = [model(input_ids=ids[:, :3]), None]
    state = parts[0].past_key_values
    rest = [model(input_ids=part, past_key_values=state).logits for part in ids[:, 3:].split(6, dim=1)]
    torch.testing.assert_close(torch.cat([parts[0].logits, *rest], dim=1), base, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def caches_latents(model: Any) -> bool:
    """Whether all heads share what is cached: latent attention does so from transformers 5.15 on."""
    cache = DynamicCache()
    model(input_ids=random_ids(1, 3), **as_cache(cache))
    return hasattr(model.config, "kv_lora_rank") and cache.layers[0].keys.shape[1] == 1


DIFFERENT = ("llama", "gemma3_text", "falcon", "deepseek_v3")
"""Families that the fast tests read with every rival; the others of `CASES` with two in turn."""


def is_fast(number: int, case: str, system: str) -> bool:
    """Return whether the fast tests read a family, the `number`-th, with a rival."""
    return case in DIFFERENT or (case in CASES and (number - RECURRENT.index(system)) % len(RECURRENT) < 2)


@pytest.mark.parametrize(
    ("case", "system"),
    [
        pytest.param(case, system, marks=[] if is_fast(number, case, system) else pytest.mark.slow)
        for number, case in enumerate(case for case in ALL_CASES if is_at_hand(case))
        for system in RECURRENT
    ],
)
def test_every_rival_serves_every_family_or_says_why_not(case: str, system: str) -> None:
    """Catches a rival that reads a family wrongly: attaching it compares pieces with the whole."""
    config = RivalConfig.from_dict(
        {"system": system, "block_size": 8, "num_memory_tokens": 3, "association_width": 4, "decay_rank": 4}
    )
    model = make_tiny(case)
    is_latent, takes_eager = caches_latents(model), case.startswith(("gemma2", "gpt_oss", "vaultgemma"))
    if system in ("infini", "gated_linear") and (is_latent or takes_eager or case.startswith("falcon")):
        with pytest.raises(
            UnsupportedModelError, match=f"{system} needs the heads' own|required for {system}|{system} adds"
        ):
            attach(model, config)
        return
    if system == "block_recurrent" and is_latent:
        with pytest.raises(UnsupportedModelError, match="needs the heads' own"):
            attach(model, config)
        return
    ids = random_ids(1, 19)
    logits = attach(model, config)(input_ids=ids).logits
    logits.square().sum().backward()
    rival: Any = model.get_decoder().rival
    trained = [name for name, p in rival.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)]
    quiet = {"armt": ("tokens", "query", "key", "share")}.get(system, ())  # W_V begins at zero, and they act through it
    required = [name for name, _ in rival.named_parameters() if not name.startswith(quiet or ("-",))]
    assert set(required) <= set(trained)


def test_presets_are_what_the_paper_compares() -> None:
    """Catches a preset that is not the system of its name."""
    config = FamConfig(block_size=16, fam_length=4, num_memory_segments=0, fam_key_bias=0.0)
    assert set(PRESETS) >= {"fam", "bswa", "bswa_m12", "bswa_stop_gradient", "transformer_xl", "attention_sinks"}
    assert preset("bswa_m12", config).num_memory_segments == 12
    assert preset("transformer_xl", config).window == 16
    assert preset("bswa_stop_gradient", config).stop_gradient
    assert preset("attention_sinks", config).num_sink_tokens == 4
    assert not preset("static_summary", config).fam_copy
    assert preset("static_summary", config).fam_length == 4
    assert preset("bswa", config).fam_length == 0
    with pytest.raises(TransformerFamError, match="there is no preset 'bsva'; did you mean bswa"):
        preset("bsva", config)


def test_rival_config_refuses_what_it_does_not_know() -> None:
    """Catches a typo that is swallowed."""
    with pytest.raises(TransformerFamError, match="no field 'num_memory_token'; did you mean num_memory_tokens"):
        RivalConfig.from_dict({"system": "rmt", "num_memory_token": 3})
    with pytest.raises(TransformerFamError, match="system is 'rtm', required is one of full, rmt"):
        RivalConfig.from_dict({"system": "rtm"})
    with pytest.raises(TransformerFamError, match="system is missing"):
        RivalConfig.from_dict({})
    with pytest.raises(TransformerFamError, match="initial_gate is 1.0, required is between 0 and 1"):
        RivalConfig(system="infini", initial_gate=1.0)
    with pytest.raises(TransformerFamError, match="num_memory_tokens is 0, required is at least 1"):
        RivalConfig(system="rmt", num_memory_tokens=0)
    with pytest.raises(UnsupportedModelError, match="recurrent_layer is 7, the model has layers 0 to 2"):
        attach(make_tiny_llama(3), RivalConfig(system="block_recurrent", recurrent_layer=7))
    with pytest.raises(UnsupportedModelError, match="has a memory already"):
        attach(with_rival("rmt"), RivalConfig(system="rmt"))


@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_reading_that_goes_on_with_other_weights_warns_once(system: str) -> None:
    """Catches a live state of another model that is taken without a word."""
    config = RivalConfig(system=system, block_size=8, num_memory_tokens=2)
    one, other = (attach(make_tiny_llama(seed=seed), config) for seed in (0, 7))
    state = one.read(random_ids(1, 40))
    with pytest.warns(UserWarning, match="the state was made on other base weights"):
        other.read(random_ids(1, 3), state)
    other.read(random_ids(1, 3), state)


def test_router_logits_are_refused_by_name() -> None:
    """Catches a head that is handed none and fails on them."""
    model: Any = attach(make_tiny("mixtral"), RivalConfig(system="rmt", block_size=8))
    with pytest.raises(TransformerFamError, match="output_router_logits is True, and a rival's rows are split"):
        model(input_ids=random_ids(1, 20), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(TransformerFamError, match="output_router_logits is True"):
        model(input_ids=random_ids(1, 20), labels=random_ids(1, 20))
