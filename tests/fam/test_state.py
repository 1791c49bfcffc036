"""FamState: copies, controls, files, and every refusal."""

import copy
import errno
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_families import make_tiny
from tiny_llama import make_tiny_llama, random_ids, random_rows

from transformerfam import FamConfig, FamState, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.decoder.architecture import difference
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.fam import state as state_module
from transformerfam.fam.memory import set_block_size, set_key_bias
from transformerfam.rivals import RivalConfig, attach
from transformerfam.weights.adapter import FamAdapter


def converted(seed: int = 0, **fields: Any) -> Any:
    config = FamConfig(**{"block_size": 8, "fam_length": 3, "num_memory_segments": 1, "fam_key_bias": 0.0} | fields)
    return convert(make_tiny_llama(2, seed=seed), config)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A model and the file of a reading."""
    model = converted()
    path = tmp_path / "state.safetensors"
    model.read(random_ids(21)).save(path)
    return model, path


SHAPES: list[dict[str, Any]] = [
    {"num_memory_segments": 0},
    {"num_memory_segments": 2, "num_sink_tokens": 2, "num_previous_fams": 3},
    {"num_memory_segments": 1, "fam_length": 0},
    FamConfig.preset("gated").replace(block_size=8, fam_length=3, num_sink_tokens=1).to_dict(),
]


def own_logits(model: Any, state: FamState) -> torch.Tensor:
    """Return the logits of 12 further tokens, over a block's end, without moving the state."""
    with torch.no_grad():
        ids = random_ids(1, 12, seed=5).expand(state.batch_size, -1)
        logits: torch.Tensor = model(input_ids=ids, past_key_values=state.fork()).logits
    return logits


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("num_read", [5, 8, 16, 21, 64])
def test_file_holds_filled_slots_alone_and_loses_nothing(fields: dict[str, Any], num_read: int, tmp_path: Path) -> None:
    """Catches a slot that is left out of a file and seen later, such as sinks in a memory that is not full yet."""
    model = converted(**fields)
    state = model.read(random_ids(num_read))
    before = own_logits(model, state)
    state.save(tmp_path / "state")
    loaded = FamState.load(tmp_path / "state", model)
    assert loaded.num_bytes == state.num_bytes
    assert torch.equal(own_logits(model, loaded), before)
    with safetensors.safe_open(tmp_path / "state", framework="pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == state.file_bytes  # noqa: SIM118
    if num_read == 64 and fields == {"num_memory_segments": 0}:
        assert state.file_bytes == state.fams.nbytes  # nothing but the FAM at a block's end


def test_file_of_several_sequences_has_each_at_its_place(tmp_path: Path) -> None:
    """Catches slots of one sequence that are written to another, and files that grow with the longest one."""
    model = converted(num_memory_segments=2, num_sink_tokens=2)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, :33] = mask[2, :15] = 0
    state = model.read(random_ids(3, 40), attention_mask=mask)
    state.save(tmp_path / "state")
    loaded = FamState.load(tmp_path / "state", model)
    assert loaded.row_lengths == (40, 7, 25)
    torch.testing.assert_close(own_logits(model, loaded), own_logits(model, state), atol=0, rtol=0)
    assert state.file_bytes == sum(state.select([row]).file_bytes for row in range(3))


def test_rounded_file_has_half_the_bytes_and_the_models_type_when_loaded(tmp_path: Path) -> None:
    """Catches a file that is rounded and not said to be, and one that is refused by the model that wrote it."""
    model = converted()
    state = model.read(random_ids(21))
    state.save(tmp_path / "half", dtype="bfloat16")
    state.save(tmp_path / "whole")
    loaded = FamState.load(tmp_path / "half", model)
    assert loaded.fams.dtype == state.fams.dtype == torch.float32
    assert torch.equal(loaded.fams, state.fams.bfloat16().float())
    torch.testing.assert_close(own_logits(model, loaded), own_logits(model, state), atol=0.05, rtol=0)
    saved = (tmp_path / "whole").stat().st_size - (tmp_path / "half").stat().st_size
    assert abs(saved - state.file_bytes / 2) < 512  # the header's places have other digits
    with pytest.raises(TransformerFamError, match="dtype is 'int8', required is one of float32, bfloat16"):
        state.save(tmp_path / "none", dtype="int8")


def test_idle_state_frees_its_block_and_takes_it_back() -> None:
    """Catches a compacted reading that keeps its buffer, or that reads on into slots that are gone."""
    model = converted(num_memory_segments=0)
    state = model.read(random_ids(21))
    num_bytes, before = state.num_bytes, own_logits(model, state)
    assert state.compact().num_bytes < num_bytes
    slots = [layer.keys.shape[-2] for layer in state.layers]
    assert slots == [3 + 5] * len(slots)  # FAM keys and the tokens of the block
    assert torch.equal(own_logits(model, state.fork()), before)
    model.read(random_ids(1), state)
    assert state.num_bytes == num_bytes
    assert state.fork().compact().select([0]).num_tokens_read == 22


@pytest.mark.parametrize("fields", SHAPES)
def test_stacked_states_read_on_as_each_alone(fields: dict[str, Any]) -> None:
    """Catches a sequence that takes another's place in the block, and a compacted one among whole ones."""
    model = converted(**fields)
    states = [model.read(random_ids(n, seed=n)) for n in (21, 8, 3, 40)]
    alone = [own_logits(model, state) for state in states]
    stacked = FamState.stack([states[0].fork().compact(), FamState.stack(states[1:3]), states[3].fork()])
    assert stacked.row_lengths == (21, 8, 3, 40)
    torch.testing.assert_close(own_logits(model, stacked), torch.cat(alone), atol=1e-5, rtol=0)
    taken = stacked.select([2, 0])
    torch.testing.assert_close(own_logits(model, taken), torch.cat([alone[2], alone[0]]), atol=1e-5, rtol=0)
    assert [state.num_tokens_read for state in states] == [21, 8, 3, 40]
    assert (stacked.histories, stacked.read_with) == ([s.histories[0] for s in states], states[0].read_with)


def test_states_that_do_not_fit_are_not_stacked() -> None:
    """Catches a batch of two models or configurations, whose answers would be another's."""
    model = converted()
    state = model.read(random_ids(5))
    with pytest.raises(TransformerFamError, match="there is no state to stack"):
        FamState.stack([])
    with pytest.raises(StateMismatchError, match="state 1 is of another model than state 0"):
        FamState.stack([state, converted().read(random_ids(5))])
    left = state.fork()
    left.is_left_by_beams = True
    with pytest.raises(StateMismatchError, match="left by beam search"):
        FamState.stack([state, left])
    set_key_bias(model, 1.0)
    with pytest.raises(StateMismatchError, match="state 1 has another configuration than state 0"):
        FamState.stack([state, model.read(random_ids(5))])


@pytest.mark.parametrize("fork", [FamState.fork, copy.copy, copy.deepcopy])
def test_fork_keeps_the_reading_as_it_is(fork: Any) -> None:
    """Catches a fork that shares tensors or counters with the reading."""
    model = converted()
    state = model.read(random_ids(21))
    first = model.read(random_ids(30, seed=1), fork(state))
    second = model.read(random_ids(30, seed=1), fork(state))
    assert state.num_tokens_read == 21
    assert torch.equal(first.fams, second.fams)
    assert not torch.equal(first.fams, state.fams)


def test_select_takes_rows_with_their_own_phase() -> None:
    """Catches rows whose counters do not follow their tensors, as in beam search."""
    model = converted()
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :6] = 0
    state = model.read(random_ids(2, 13), attention_mask=mask)
    chosen = state.select([1, 0, 1])
    assert chosen.row_lengths == (7, 13, 7)
    assert torch.equal(chosen.fams[:, 0], state.fams[:, 1])
    assert state.batch_size == 2


def test_zero_memory_erases_what_the_fam_held() -> None:
    """Catches a control that leaves the FAM's keys in the cache, also in the middle of a block."""
    model = converted(num_memory_segments=0)
    tail = random_ids(13, seed=9)
    logits = []
    for seed in (1, 2):
        state = model.read(torch.cat((random_ids(8, seed=seed), tail[:3]))).zero_memory()
        assert not state.fams.any()
        for layer in state.layers:  # this block's keys were made with the memory at hand: make them equal
            layer.put(layer.sections.block, torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
        logits.append(model(input_ids=tail[None, 3:], past_key_values=state).logits)
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("preset", ["paper", "gated", "gated_rows"])
def test_swapped_and_initial_memory_read_on_as_such_readings_would(preset: str) -> None:
    """Catches a control whose FAM and the keys made from it are of different texts, at a block's start and within."""
    changes = UPDATE_PRESETS[preset] | {"num_memory_segments": 0, "fam_key_bias": 0.0}
    model, tail = converted(**changes), random_ids(2, 7, seed=9)
    for num_begun in (0, 3):
        texts = torch.cat((random_ids(2, 16), tail[:, :num_begun]), dim=1)
        state = model.read(texts)
        swapped, other = state.fork().swap_memory(), model.init_state(2, fam=model.read(texts[[1, 0], :16]).fams)
        initial = state.fork().initial_memory()
        assert torch.equal(initial.fams, model.init_state(2).fams)
        assert torch.equal(swapped.fams, state.fams.flip(1))
        if num_begun == 0:
            for there, required in ((swapped, other), (initial, model.init_state(2))):
                pair = [model(input_ids=tail, past_key_values=state).logits for state in (there, required)]
                torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)
        else:
            model.read(tail[:, :num_begun], other)
            for layer, required in zip(swapped.layers, other.layers, strict=True):
                fam = slice(layer.sections.fam, layer.sections.block)
                torch.testing.assert_close(layer.keys[..., fam, :], required.keys[..., fam, :], atol=1e-5, rtol=1e-5)


def test_saved_fam_starts_a_reading_with_its_residual() -> None:
    """Catches a saved FAM whose first residual is dropped (B.2.3), and rows that mix saved and initial FAMs."""
    model, ids = converted(), random_ids(2, 8)
    saved = model.read(random_ids(24, seed=3)).fams
    mixed = model.init_state(2, fam=saved.expand(-1, 2, -1, -1), is_saved=[True, False])
    assert mixed.starts_from_saved_fam == [True, False]
    model.read(ids, mixed)
    from_saved = model.read(ids[:1], model.init_state(1, fam=saved))
    from_start = model.read(ids[1:])
    torch.testing.assert_close(mixed.fams[:, 0], from_saved.fams[:, 0])
    torch.testing.assert_close(mixed.fams[:, 1], from_start.fams[:, 0])
    without = model.init_state(1, fam=saved)
    without.starts_from_saved_fam = [False]
    assert not torch.allclose(model.read(ids[:1], without).fams, from_saved.fams)


@pytest.mark.parametrize("fam_dtype", ["float32", "bfloat16"])
def test_fam_dtype_is_kept_under_bfloat16(fam_dtype: str) -> None:
    """Catches a FAM that is silently kept in the model's type."""
    model = convert(
        make_tiny_llama(2).bfloat16(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, fam_dtype=fam_dtype)
    )
    state = model.read(random_ids(30))
    assert state.fams.dtype == getattr(torch, fam_dtype)
    assert state.fams.isfinite().all()


def test_reads_in_bfloat16_as_in_float32() -> None:
    """Catches a fault on the path that adds only the change to a float32 FAM: 5 % is bfloat16 rounding here."""
    ids = random_ids(40)
    exact = converted().read(ids).fams
    model = convert(
        make_tiny_llama(2).bfloat16(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
    )
    error = (model.read(ids).fams - exact).norm() / exact.norm()
    assert error < 0.05


def test_crop_and_reset_are_refused() -> None:
    state = converted().init_state()
    with pytest.raises(TransformerFamError, match=r"cannot take back 3 tokens.*fork\(\)"):
        state.crop(-3)
    with pytest.raises(TransformerFamError, match="cannot be reset"):
        state.reset()


def test_fams_without_fam_is_refused() -> None:
    with pytest.raises(TransformerFamError, match="fam_length is 0"):
        _ = converted(fam_length=0).init_state().fams


def test_another_batch_size_is_refused() -> None:
    model = converted()
    with pytest.raises(StateMismatchError, match=r"state holds 1 sequences, input has 2; .*init_state\(batch_size=2\)"):
        model(input_ids=random_ids(2, 4), past_key_values=model.init_state())


def test_state_of_another_configuration_is_refused() -> None:
    with pytest.raises(StateMismatchError, match="state was made with"):
        converted()(input_ids=random_ids(1, 4), past_key_values=converted(block_size=4).init_state())


def test_saved_fam_of_wrong_shape_is_refused() -> None:
    with pytest.raises(StateMismatchError, match=r"fam has shape \(2, 1, 4, 32\), required is .*\(2, 1, 3, 32\)"):
        converted().init_state(fam=random_rows(2, 4, 32))


@pytest.mark.parametrize("value", [-5, 2.5, float("nan"), float("inf"), True, "8", None, 2**60, torch.tensor(True)])
@pytest.mark.parametrize("name", ["position_offset", "batch_size"])
def test_numbers_of_a_new_state_are_integers_in_range(name: str, value: Any) -> None:
    """Catches a state that is read for hours, saved, and refused when it is loaded."""
    for model in (converted(), attach(make_tiny_llama(), RivalConfig.from_dict({"system": "rmt"}))):
        with pytest.raises(TransformerFamError, match=f"{name} is .*, required is an integer from [01] to 2.53"):
            model.init_state(**{name: value})


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_state_with_a_number_of_another_library_is_saved_and_loaded(value: Any, tmp_path: Path) -> None:
    """Catches numbers that JSON does not know."""
    model = converted()
    state = model.init_state(value, position_offset=value, is_saved=torch.tensor([False] * 3))
    model.read(random_ids(3, 5), state).save(tmp_path / "state")
    assert FamState.load(tmp_path / "state", model).position_offset == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"is_saved": [0, 1]}, r"is_saved is \[0, 1\], required are True or False"),
        ({"is_saved": [True, False]}, "required are 2 flags, and a saved fam where one is True"),
        ({"fam": [[1.0]]}, "fam is a list, required is a tensor of floating numbers"),
        ({"fam": torch.zeros(2, 3, 32, dtype=torch.long)}, "fam is a torch.int64, required is a tensor of floating"),
    ],
)
def test_other_arguments_of_a_new_state_are_checked(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(TransformerFamError, match=match):
        converted().init_state(2, **arguments)


@pytest.mark.parametrize("value", [True, "3", None, float("nan"), 1e39, [1.0]])
def test_key_bias_and_block_size_are_numbers(value: Any) -> None:
    """Catches True taken for 1, and a traceback of Python's float."""
    model = converted()
    for change, name in ((set_key_bias, "fam_key_bias"), (set_block_size, "block_size")):
        with pytest.raises(TransformerFamError, match=f"{name} is .*, required is"):
            change(model, value)
    set_key_bias(model, 2)
    assert type(model.fam_config.fam_key_bias) is float


@pytest.mark.parametrize("rows", [[2], [-1], [], [True, False], [0.0], torch.tensor(1), [[0]]])
def test_rows_that_are_none_are_refused(rows: Any) -> None:
    """Catches a traceback of Python's lists, and flags taken for numbers."""
    with pytest.raises(TransformerFamError, match="required are numbers of sequences from 0 to 1; change rows"):
        converted().init_state(2).select(rows)


def test_load_refuses_another_configuration(saved: tuple[Any, Path]) -> None:
    with pytest.raises(
        StateMismatchError, match="another fam config: fam_query_position is 'current' there and 'written'"
    ):
        FamState.load(saved[1], converted(fam_query_position="written"))


def test_load_refuses_another_model(saved: tuple[Any, Path]) -> None:
    other = convert(make_tiny_llama(3), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1))
    with pytest.raises(StateMismatchError, match="another architecture: num_hidden_layers is 2 there and 3 here"):
        FamState.load(saved[1], other)


def test_load_warns_of_other_weights(saved: tuple[Any, Path]) -> None:
    with pytest.warns(UserWarning, match=r"made on other base weights \(SHA-256 [0-9a-f]{12} there"):
        FamState.load(saved[1], converted(seed=7))


def test_load_refuses_another_dtype(saved: tuple[Any, Path]) -> None:
    other = convert(
        make_tiny_llama(2).bfloat16(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
    )
    with (
        pytest.warns(UserWarning, match="other base weights"),
        pytest.raises(StateMismatchError, match=r"torch.float32 .* as keys of layer 0, required is torch.bfloat16"),
    ):
        FamState.load(saved[1], other)


def test_load_refuses_another_batch_size(saved: tuple[Any, Path]) -> None:
    with pytest.raises(StateMismatchError, match="holds 1 sequences, required are 4"):
        FamState.load(saved[1], saved[0], batch_size=4)


def test_load_refuses_another_version(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "STATE_FORMAT_VERSION", 99)
    with pytest.raises(CorruptFileError, match="format version 2, this package reads 99"):
        FamState.load(saved[1], saved[0])


def test_load_refuses_a_missing_file(saved: tuple[Any, Path]) -> None:
    with pytest.raises(CorruptFileError, match="does not exist"):
        FamState.load(saved[1].with_name("none"), saved[0])


def test_load_refuses_a_truncated_file(saved: tuple[Any, Path]) -> None:
    saved[1].write_bytes(saved[1].read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="truncated or of another program"):
        FamState.load(saved[1], saved[0])


def test_load_refuses_a_foreign_file(saved: tuple[Any, Path]) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved[1])
    with pytest.raises(CorruptFileError, match="not written by transformerfam"):
        FamState.load(saved[1], saved[0])
    saved[1].write_text("Call me Ishmael.")
    with pytest.raises(CorruptFileError, match="not a readable safetensors file"):
        FamState.load(saved[1], saved[0])


def test_load_refuses_flipped_bits_anywhere(saved: tuple[Any, Path]) -> None:
    """Catches damage that a format without checksum lets through: one bit of every 97th byte, one file each."""
    original = saved[1].read_bytes()
    (header_length,) = struct.unpack("<Q", original[:8])
    places = [*range(0, 8 + header_length, 97), *range(8 + header_length, len(original), 997)]
    for place in places:
        damaged = bytearray(original)
        damaged[place] ^= 4
        saved[1].write_bytes(damaged)
        with pytest.raises(TransformerFamError):
            FamState.load(saved[1], saved[0])


def test_full_disk_leaves_the_old_file(saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a save that writes over the old file before the new one is whole."""
    model, path = saved
    before = path.read_bytes()

    def write_half(tensors: Any, temporary: str, metadata: Any) -> None:
        Path(temporary).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformerfam.files.tensors.save_file", write_half)
    with pytest.raises(TransformerFamError, match="No space left on device; a file that was there before is unchanged"):
        model.read(random_ids(50)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_save_to_a_missing_folder_says_so(saved: tuple[Any, Path]) -> None:
    with pytest.raises(TransformerFamError, match="could not write"):
        saved[0].init_state().save(saved[1].parent / "none" / "state.safetensors")


def test_saved_file_is_plain_safetensors(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """Catches a file that other tools cannot read."""
    shutil.copy(saved[1], tmp_path / "copy.safetensors")
    with safetensors.safe_open(tmp_path / "copy.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["transformerfam"])["kind"] == "state"
        assert file.get_tensor("layers.0.fam").shape == (1, 3, 32)


CONSTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention's scale": ("granite", {"attention_multiplier": 0.9}),
    "chosen experts": ("mixtral", {"num_experts_per_tok": 1}),
    "soft cap": ("gemma2", {"attn_logit_softcapping": 5.0}),
    "clipped queries": ("olmo", {"clip_qkv": 0.1}),
    "activation": ("gemma2", {"hidden_activation": "relu"}),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_state_of_a_model_with_another_constant_is_refused(name: str, tmp_path: Path) -> None:
    """Catches equal weights in a model that computes something else with them; what is not felt may differ."""
    case, change = CONSTANTS[name]
    (field, _), config = *change.items(), FamConfig(block_size=8, fam_length=2, fam_key_bias=0.0)
    model, other = (convert(make_tiny(case, **changes), config) for changes in ({}, change))
    state = model.read(random_ids(1, 30))
    state.save(tmp_path / "state")
    with pytest.raises(StateMismatchError, match=f"was made on another architecture: {field} is"):
        FamState.load(tmp_path / "state", other)
    with pytest.raises(StateMismatchError, match="state belongs to another model"):
        other.read(random_ids(1, 3), state.fork())
    FamAdapter.from_model(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(StateMismatchError, match=f"adapter was trained on another model: {field} is"):
        FamAdapter.from_pretrained(tmp_path / "adapter").apply(make_tiny(case, **change))
    alike = convert(make_tiny(case, initializer_range=0.2, attention_dropout=0.1), config)
    alike.load_state_dict(model.state_dict())
    FamState.load(tmp_path / "state", alike)


def test_constants_that_one_version_alone_knows_are_not_compared() -> None:
    """Catches states that are lost when transformers adds a field, or when this package began to compare them."""
    there = {"class": "LlamaForCausalLM", "constants": {"logit_scale": 1.0}}
    assert difference(there, {"class": "LlamaForCausalLM", "constants": {"new": 3}}) is None
    assert difference({"class": "LlamaForCausalLM"}, there) is None
    assert difference(there, there | {"constants": {"logit_scale": 2.0}}) == ("logit_scale", 1.0, 2.0)


@pytest.mark.parametrize("system", ["bswa", "fam", "rmt"])
def test_reading_that_no_load_would_take_is_not_written(system: str, tmp_path: Path) -> None:
    """Catches a reading that is found to be lost when it is loaded."""
    model: Any = make_tiny_llama()
    if system == "rmt":
        attach(model, RivalConfig(system="rmt", block_size=8))
    else:
        convert(model, FamConfig(block_size=8, fam_length=0 if system == "bswa" else 2))
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    state = model.read([1, 2, 3, 5, 7])
    with pytest.raises(TransformerFamError, match="the reading has numbers in .* that are not finite"):
        state.save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "match"), [("x" * 300, "choose a shorter name"), ("a\0b", "which is not a file name")]
)
def test_name_that_no_file_can_have_is_refused(name: str, match: str, tmp_path: Path) -> None:
    """Catches Python's own errors, which no `except TransformerFamError` around a save sees."""
    model = convert(make_tiny_llama(), FamConfig(block_size=8, fam_length=2, num_memory_segments=0))
    with pytest.raises(TransformerFamError, match=match):
        model.read(torch.zeros(1, 3, dtype=torch.long)).save(tmp_path / name)
    with pytest.raises(TransformerFamError):
        FamState.load(tmp_path / name, model)
