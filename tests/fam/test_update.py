"""The choices of the FAM's update: in half precision, checkpointed, over many blocks; files of before; bad input."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import make_tiny
from tiny_llama import make_tiny_llama, random_ids, random_rows

from transformerfam import FamConfig, FamState, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.errors import StateMismatchError, TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import fam_parameters
from transformerfam.fam.piece import Piece
from transformerfam.fam.prompt import personal_memory, prefix_from_prompt
from transformerfam.fam.state import STATE_FORMAT_VERSION
from transformerfam.files import load_tensors, save_tensors

SHAPE: dict[str, Any] = {"block_size": 6, "fam_length": 3, "num_memory_segments": 1, "fam_key_bias": 0.0}
GATED = UPDATE_PRESETS["gated_rows"]
SLOTS = UPDATE_PRESETS["gated_slots"]
BLOCK = UPDATE_PRESETS["gated"]
UPDATES: dict[str, dict[str, Any]] = {
    "paper": {},
    "static summary": {"fam_query": "initial", "fam_residual": "none"},
    "gated": GATED,
    "gated without residual": {"fam_update": "gated", "fam_residual": "none"},
    "slots": SLOTS,
    "block": BLOCK,
}
every_update = pytest.mark.parametrize("name", UPDATES)


def converted(base: Any = None, scale: float = 1.0, **changes: Any) -> Any:
    """Convert a tiny model, its prompt drawn."""
    model: Any = convert(make_tiny_llama() if base is None else base, FamConfig(**SHAPE | changes))
    with torch.no_grad():
        for rows in fam_parameters(model):
            rows.copy_(scale * random_rows(*rows.shape, seed=1))
    return model


@torch.no_grad()
@every_update
@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
def test_half_precision_is_off_by_rounding_alone(name: str, way: str) -> None:
    """Catches a residual that is added and subtracted again: large rows leave only rounding."""
    ids, found = random_ids(1, 19), []
    for is_half in (False, True):
        model = converted(scale=300.0, **UPDATES[name])
        if is_half and way != "autocast":
            model.to(getattr(torch, way))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_half and way == "autocast"):
            found.append(model.read(ids).fams[1:].float())  # the lowest layer keeps the prompt where rows go up
    error = (found[1] - found[0]).abs().max() / found[0].abs().max()
    assert error < (0.005 if way == "float16" else 0.05)


@every_update
def test_checkpointed_blocks_have_the_same_gradients(name: str) -> None:
    """Catches a share, or queries of the initial FAM, that recomputing leaves out of the graph."""
    grads = []
    for is_checkpointed in (False, True):
        model = converted(**UPDATES[name]).train()
        if is_checkpointed:
            model.get_decoder().gradient_checkpointing = True
        model(input_ids=random_ids(2, 25), labels=random_ids(2, 25, seed=1)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, expected in grads[0].items():
        torch.testing.assert_close(grads[1][parameter], expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_gated_rows_stay_of_the_size_of_their_values() -> None:
    """Catches rows that grow with the number of blocks, as those of the paper do."""
    ids, sizes = random_ids(1, 6 * 100), {}
    for name in ("paper", "gated", "gated without residual", "slots", "block"):
        model, sizes[name] = converted(**UPDATES[name]), []
        state = model.init_state()
        for block in ids.split(6, dim=1):
            model.read(block, state)
            sizes[name].append(float(state.fams[1].pow(2).mean().sqrt()))
    assert sizes["paper"][-1] > 4 * sizes["paper"][9]
    for name in ("gated", "gated without residual", "slots", "block"):
        assert max(sizes[name][50:]) < 2 * max(sizes[name][:10])


def test_only_rows_that_are_needed_go_through_the_layers() -> None:
    """Catches 2 F rows where F do, and F where attention makes its own queries."""

    def num_rows(model: Any, back_end: str) -> int:
        model.set_attn_implementation(back_end)
        seen: list[int] = []
        handle = model.get_decoder().norm.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1]))
        model.read(random_ids(1, 6))
        handle.remove()
        return seen[-1] - 6

    for changes, rows in ((UPDATES["static summary"], 3), (GATED, 3), (GATED | {"fam_query": "previous"}, 3)):
        assert num_rows(converted(**changes), "fam") == rows
    for back_end in ("fam", "eager"):
        assert num_rows(converted(**SLOTS), back_end) == num_rows(converted(**BLOCK), back_end) == 3
    assert num_rows(converted(**GATED), "eager") == 6
    assert num_rows(converted(**GATED, fam_position="zero"), "fam") == 6
    assert num_rows(converted(make_tiny("cohere2"), **GATED | {"fam_feeds": "same"}), "fam") == 6


@torch.no_grad()
def test_back_end_may_change_within_a_reading() -> None:
    """Catches queries of the initial FAM that are kept for a back end which takes none, or the reverse."""
    model, ids = converted(**GATED), random_ids(1, 31)
    expected = model.read(ids).fams
    for first, second in (("fam", "eager"), ("eager", "fam")):
        model.set_attn_implementation(first)
        state = model.read(ids[:, :14])
        model.set_attn_implementation(second)
        torch.testing.assert_close(model.read(ids[:, 14:], state).fams, expected, atol=1e-5, rtol=1e-5)


def test_detached_state_holds_no_graph() -> None:
    """Catches queries of the initial FAM that keep the graph of a training step that is over."""
    model = converted(**GATED)
    state = model.init_state()
    model(input_ids=random_ids(1, 13), past_key_values=state)
    assert any(layer.query.requires_grad for layer in state.layers)
    for layer in state.detach().layers:
        assert not layer.query.requires_grad
        assert not any(tensor.requires_grad for tensor in layer.tensors().values())


def test_former_field_is_two_choices() -> None:
    """Catches a static summary of before that is read as the paper's FAM."""
    static = FamConfig(fam_query="initial", fam_residual="none")
    assert FamConfig(fam_copy=False) == static == FamConfig.from_dict({"fam_copy": False})
    assert FamConfig(fam_copy=True) == FamConfig() == FamConfig.preset("paper")
    assert FamConfig.from_dict({"fam_copy": False, "fam_query": "initial", "fam_residual": "none"}) == static
    assert "fam_copy" not in static.to_dict()
    assert FamConfig.from_dict(static.to_dict()) == static
    with pytest.raises(TransformerFamError, match="fam_copy=True is fam_query='previous' and fam_residual='previous'"):
        FamConfig(fam_copy=True, fam_query="initial")
    with pytest.raises(TransformerFamError, match="fam_copy=False is .*given are 'previous' and 'initial'; leave"):
        FamConfig(fam_copy=False, fam_residual="initial")


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper", "static summary"])
def test_state_of_before_goes_on(name: str, tmp_path: Path) -> None:
    """Catches a file without the new fields, or with a tensor's former name, that is refused or read wrongly."""
    model, ids = converted(**UPDATES[name]), random_ids(1, 31)
    model.read(ids[:, :20]).save(tmp_path / "new.safetensors")
    tensors, metadata = load_tensors(tmp_path / "new.safetensors", "state", STATE_FORMAT_VERSION)
    fields = metadata["identity"]["fam_config"]
    fields["fam_copy"] = name == "paper"
    for field in ("fam_update", "fam_query", "fam_residual", "fam_feeds"):
        del fields[field]
    former = {key.replace("initial_fam", "query_fam"): tensor for key, tensor in tensors.items()}
    assert (former.keys() == tensors.keys()) == (name == "paper")
    save_tensors(tmp_path / "old.safetensors", former, metadata)
    state = FamState.load(tmp_path / "old.safetensors", model)
    expected = model.read(ids[:, 20:], model.read(ids[:, :20])).fams
    assert torch.equal(model.read(ids[:, 20:], state).fams, expected)


def test_state_of_another_update_is_refused(tmp_path: Path) -> None:
    """Catches a reading that continues by another update than it began with."""
    state = converted(**GATED).read(random_ids(1, 13))
    state.save(tmp_path / "state.safetensors")
    other = converted()
    with pytest.raises(StateMismatchError, match="another fam config: fam_feeds is 'next' there and 'same' here"):
        FamState.load(tmp_path / "state.safetensors", other)
    with pytest.raises(StateMismatchError, match="state was made with FamConfig"):
        other.read(random_ids(1, 5), state)


def test_impossible_choices_are_refused() -> None:
    """Catches a gate that is silently left out, and a FAM that would never change."""
    with pytest.raises(TransformerFamError, match="fam_update is 'gated', required is 'paper' with fam_length 0"):
        FamConfig.preset("gated", fam_length=0)
    with pytest.raises(TransformerFamError, match="no preset 'gate'; known are paper, gated, gated_slots, gated_rows"):
        FamConfig.preset("gate")
    with pytest.raises(TransformerFamError, match="no field 'fam_gate'"):
        FamConfig.preset("gated", fam_gate=True)
    with pytest.raises(TransformerFamError, match="fam_update is 'lstm', required is one of paper, gated"):
        FamConfig(fam_update="lstm")  # type: ignore[arg-type]
    with pytest.raises(
        TransformerFamError, match="fam_feeds is 'next', required is 'same', or 'slots' .* one layer alone"
    ):
        FamConfig.preset("gated_rows", fam_layers=(1,))
    with pytest.raises(UnsupportedModelError, match="a model of one layer has no next one to feed"):
        converted(make_tiny_llama(1), **GATED)
    with pytest.raises(
        TransformerFamError, match="fam_query is 'previous', required is 'below' with fam_feeds='slots'"
    ):
        FamConfig(fam_feeds="slots")
    with pytest.raises(
        TransformerFamError, match="fam_residual is 'below', required is 'below' with fam_feeds='slots'"
    ):
        FamConfig(fam_residual="below")
    with pytest.raises(TransformerFamError, match="fam_share is 'head', required is 'row' without fam_feeds='slots'"):
        FamConfig(fam_share="head")
    for field, value in (("fam_init", "prefix"), ("fam_position", "zero"), ("fam_norm_bound", 1.0)):
        with pytest.raises(TransformerFamError, match=f"{field} is .* with fam_feeds='slots'"):
            FamConfig(**SLOTS | {field: value})
    with pytest.raises(UnsupportedModelError, match="fam_feeds is 'slots', and a model of one layer has no next one"):
        converted(make_tiny_llama(1), **SLOTS)
    with pytest.raises(TransformerFamError, match="fam_value is 'block', required is 'rows' without fam_feeds='slots'"):
        FamConfig(fam_value="block")
    with pytest.raises(TransformerFamError, match="'same', or 'slots' with fam_value='block', where one layer alone"):
        FamConfig(**SLOTS | {"fam_layers": (1,)})
    assert converted(make_tiny_llama(1), **BLOCK).read(random_ids(1, 14)).fams.isfinite().all()
    slots = converted(**SLOTS)
    with pytest.raises(TransformerFamError, match="fam_feeds is 'slots', required for a prefix is another"):
        prefix_from_prompt(slots)
    with pytest.raises(TransformerFamError, match="required for a personal memory is another fam_feeds"):
        personal_memory(slots, slots.init_state().fams[:, 0])
    flex = make_tiny_llama()
    flex.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match="'flex_attention' gives no weights"):
        converted(flex, **GATED)
    assert FamConfig.preset("gated").without_fam().fam_length == 0


@torch.no_grad()
def test_mean_of_one_key_is_that_key() -> None:
    """Catches a block of which the slots hold something else than its keys and values, or at another place."""
    model = converted(**BLOCK | {"block_size": 1, "fam_length": 1, "num_memory_segments": 0, "fam_share": "row"})
    window = converted(fam_length=0, block_size=1, num_memory_segments=1)
    ids = random_ids(1, 2)
    state, expected = model.read(ids[:, :1]), window.read(ids[:, :1])
    for layer, plain in list(zip(state.layers, expected.layers, strict=True))[:1]:  # those above have seen the prompt
        key, value = layer.turner.turn(*layer.slots(), 1)  # the segment is in front of position 1
        torch.testing.assert_close(key, plain.keys[:, :, :1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value, plain.values[:, :, :1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("update", [SLOTS, BLOCK], ids=["slots", "block"])
def test_fam_of_slots_serves_any_block_and_any_memory_segments(update: dict[str, Any]) -> None:
    """Catches slots that are kept where one configuration has them, and read elsewhere in another."""
    saved = converted(**update).read(random_ids(1, 12)).fams
    for changes in ({"num_memory_segments": 3}, {"block_size": 9}, {"num_sink_tokens": 2, "num_previous_fams": 2}):
        there = []
        for shape in (
            {"num_memory_segments": 0, "block_size": 8},
            {"num_memory_segments": 0, "block_size": 8} | changes,
        ):
            model = converted(**update | shape)
            state = model.init_state(1, fam=saved)
            there.append(model(input_ids=random_ids(1, 5, seed=3), past_key_values=state).logits)
        torch.testing.assert_close(there[1], there[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@every_update
def test_interrupted_update_is_forgotten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of a piece that was not read to its end, kept by a shorter one that follows."""
    model, ids = converted(**UPDATES[name]), random_ids(1, 30)
    state = model.read(ids[:, :14])
    before, mlp = state.fams.clone(), model.model.layers[1].mlp
    with monkeypatch.context() as patched:
        patched.setattr(mlp, "forward", lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(input_ids=ids[:, 14:18], past_key_values=state)
    model.read(ids[:, 14:15], state)
    assert torch.equal(state.fams, before)
    torch.testing.assert_close(model.read(ids[:, 15:], state).fams, model.read(ids).fams, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_share_that_is_no_number_is_refused_and_the_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a NaN that stays in the memory for good."""
    model, ids = converted(**GATED), random_ids(1, 30)
    state = model.read(ids[:, :14])
    before, note_weights = state.fams.clone(), Piece.note_weights

    def note(piece: Piece, layer: Any, weights: Any) -> None:
        note_weights(piece, layer, weights * torch.nan)

    monkeypatch.setattr(Piece, "note_weights", note)
    with pytest.raises(TransformerFamError, match="the attention of a FAM row is not a number"):
        model.read(ids[:, 14:], state)
    monkeypatch.undo()
    assert torch.equal(state.fams, before)
    expected = model.read(ids[:, 14:], model.read(ids[:, :14])).fams
    assert torch.equal(model.read(ids[:, 14:], state).fams, expected)
