"""Files are read strictly: what is not as this package writes it is refused by name, whatever its checksum says."""

import json
import re

import pytest
import torch
from command_line import run
from tiny_llama import make_tiny_llama
from training_recipes import SMALLEST_TRAINING as RECIPE
from training_recipes import small_recipe

from transformerfam import FamConfig, FamState, convert
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.fam.state import STATE_FORMAT_VERSION
from transformerfam.files import load_tensors, save_tensors
from transformerfam.rivals import RivalConfig, attach
from transformerfam.rivals.state import RivalState
from transformerfam.training.checkpoint import last_log_row, recipe_of_run
from transformerfam.training.trainer import Trainer
from transformerfam.versions import require_peft
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.peft_adapters import inject_lora

CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=2, num_memory_segments=1)


@pytest.fixture(scope="module")
def model():
    return convert(make_tiny_llama(), CONFIG)


@pytest.fixture
def saved(model, tmp_path):
    """Save a state, and yield a function that saves it again with other tensors or metadata."""
    path = tmp_path / "s"
    model.read(torch.arange(20)[None]).save(path)

    def change(tensors=None, **metadata):
        old_tensors, old = load_tensors(path, "state", STATE_FORMAT_VERSION)
        values = {name: value for name, value in (old | metadata).items() if value is not None}
        save_tensors(path, old_tensors | (tensors or {}), values)
        return path

    return change


def test_state_as_it_was_saved_is_taken(model, saved):
    assert FamState.load(saved(), model).num_tokens_read == 20


@pytest.mark.parametrize(
    "metadata",
    [
        {"block_fill": [-1]},
        {"block_fill": [2.5]},
        {"block_fill": ["2"]},
        {"block_fill": [True]},
        {"block_fill": 2},
        {"block_fill": None},
        {"block_fill": []},
        {"block_fill": [1, 2]},
        {"num_blocks_per_row": [-3]},
        {"num_blocks_per_row": [[1]]},
        {"starts_from_saved_fam": ["no"]},
        {"starts_from_saved_fam": [0]},
        {"position_offset": None},
        {"position_offset": -1},
        {"position_offset": "far"},
        {"identity": None},
        {"identity": "a model"},
        {"identity": {"architecture": 3}},
        {"block_fill": [2**60]},
        {"histories": [1, 2]},
        {"histories": ["a"]},
        {"histories": [True]},
        {"histories": [-1]},
        {"histories": {"0": 1}},
        {"unread_ids": []},
        {"unread_ids": [61]},
        {"unread_ids": [1.5]},
        {"unread_ids": [True]},
        {"unread_ids": "x"},
    ],
)
def test_state_with_metadata_of_another_form_is_refused(model, saved, metadata):
    """Would catch places that no reading has, and a traceback where a field is missing."""
    with pytest.raises(CorruptFileError, match="has metadata of another form .* make the state again"):
        FamState.load(saved(**metadata), model)


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_version_is_an_integer(model, saved, version):
    """Would catch True, which Python takes for 1."""
    with pytest.raises(CorruptFileError, match=f"has format version {version!r}, this package reads 2"):
        FamState.load(saved(format_version=version), model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_tensor_of_a_type_that_nothing_has_is_refused(model, saved, tmp_path, dtype):
    """Would catch a traceback of torch, and numbers that are not finite in types that are not looked at."""
    with pytest.raises(CorruptFileError, match=f"has layers.1.fam of type {dtype}, which no state has"):
        FamState.load(saved({"layers.1.fam": torch.zeros(1, 2, 32).to(dtype)}), model)
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    tensors, metadata = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    save_tensors(tmp_path / "fam.safetensors", {"prompt": tensors["prompt"].to(dtype)}, metadata)
    with pytest.raises(CorruptFileError, match=f"has prompt of type {dtype}, which no adapter has"):
        FamAdapter.from_pretrained(tmp_path)


def test_ids_of_a_rival_s_state_are_checked_too(tmp_path):
    rival = attach(make_tiny_llama(), RivalConfig(system="rmt", block_size=8))
    rival.read(torch.arange(20)[None]).save(tmp_path / "s")
    tensors, metadata = load_tensors(tmp_path / "s", "rival state", 1)
    for name in ("histories", "unread_ids"):
        save_tensors(tmp_path / "s", tensors, metadata | {name: ["a"]})
        with pytest.raises(CorruptFileError, match=f"{name} has 'a'"):
            RivalState.load(tmp_path / "s", rival)


def test_state_with_other_tensors_is_refused(model, saved):
    """Would catch NaN that gives nonsense answers, and tensors that are never read."""
    path = saved(block_fill=[8])
    with pytest.raises(CorruptFileError, match="has 8 tokens in a block of 8"):
        FamState.load(path, model)
    saved({"layers.9.keys": torch.zeros(1)}, block_fill=[4])
    with pytest.raises(CorruptFileError, match="holds layers.9.keys, which is of no layer here"):
        FamState.load(path, model)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_state_with_numbers_that_are_not_finite_is_refused(model, saved, number):
    """Would catch a reading whose every answer is noise."""
    fam = load_tensors(saved(), "state", STATE_FORMAT_VERSION)[0]["layers.1.fam"]
    fam[0, 1, 2] = number
    with pytest.raises(CorruptFileError, match="has numbers in layers.1.fam that are not finite"):
        FamState.load(saved({"layers.1.fam": fam}), model)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "{", ""])
def test_metadata_that_is_no_object_is_refused(tmp_path, text):
    """Would catch a traceback of json."""
    from safetensors.torch import save_file

    from transformerfam.files import CHECKSUM_KEY, METADATA_KEY, digest_tensors

    save_file({}, tmp_path / "x", metadata={METADATA_KEY: text, CHECKSUM_KEY: digest_tensors({}, text)})
    with pytest.raises(CorruptFileError, match="metadata of another form|holds a None, required is a state"):
        load_tensors(tmp_path / "x", "state", 1)


@pytest.mark.parametrize(
    "metadata", [{"fam_config": 3}, {"notes": None}, {"architecture": None}, {"lora_config": {}}, {"base_digest": None}]
)
def test_adapter_with_metadata_of_another_form_is_refused(model, tmp_path, metadata):
    """Would catch a traceback from a memory that somebody wrote by hand."""
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    tensors, old = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    values = {name: value for name, value in (old | metadata).items() if value is not None}
    save_tensors(tmp_path / "fam.safetensors", tensors, values)
    with pytest.raises(CorruptFileError, match="metadata of another form|adapter_model.safetensors cannot be read"):
        FamAdapter.from_pretrained(tmp_path)


ADAPTER_TENSORS = {
    "extra": ({"junk": torch.zeros(3)}, "has a tensor 'junk', which a memory with fam_init 'prompt'"),
    "both": ({"prefix": torch.zeros(2, 2, 32)}, "has a tensor 'prefix', which a memory with fam_init 'prompt'"),
    "saved_fam": ({"saved_fam": torch.zeros(9, 9)}, r"saved_fam is \(9, 9\), required is .* \(2, 2, 32\)"),
    "integers": ({"prompt": torch.zeros(2, 32, dtype=torch.long)}, "tensors that are not floating numbers"),
    "shape": ({"prompt": torch.zeros(32)}, r"prompt is \(32,\), required is \(2, 32\)"),
}


@pytest.mark.parametrize("name", ADAPTER_TENSORS)
def test_adapter_with_other_tensors_is_refused(model, tmp_path, name):
    """Would catch tensors that are never read, and a saved FAM that fails when the first reading starts."""
    changes, message = ADAPTER_TENSORS[name]
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    tensors, metadata = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    save_tensors(tmp_path / "fam.safetensors", tensors | changes, metadata)
    with pytest.raises(TransformerFamError, match=message):
        FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama())


LORA_CONFIGS = {
    "no object": ([1], "lora_config is \\[1\\]"),
    "rank of letters": ({"r": "x"}, "lora_config has r 'x'"),
    "no rank": ({"r": 0}, "lora_config has r 0"),
    "rank beyond all memory": ({"r": 10**9}, "lora_config has r 1000000000, and its tensors have at most 48 rows"),
    "another rank": ({"r": 3}, "LoRA does not fit its configuration and this model: size mismatch"),
    "another type": ({"peft_type": "IA3"}, "peft_type is 'IA3', required is 'LORA'"),
    "no number": ({"lora_alpha": float("nan")}, "lora_config has lora_alpha nan"),
    "endless": ({"lora_alpha": float("inf")}, "lora_config has lora_alpha inf"),
    "letters": ({"lora_alpha": "x"}, "lora_config is not one that PEFT accepts"),
    "no layer": ({"target_modules": ["zzz"]}, "lora_config is not one that PEFT accepts"),
    "a number of layers": ({"target_modules": 5}, "lora_config is not one that PEFT accepts"),
    "dropout": ({"lora_dropout": 5}, "lora_config is not one that PEFT accepts"),
    "another layer": ({"target_modules": ["v_proj"]}, "LoRA for unknown parts|does not fit|has no tensor"),
}


@pytest.mark.parametrize("name", LORA_CONFIGS)
def test_adapter_with_lora_of_another_form_is_refused(tmp_path, name):
    """Would catch tracebacks of PEFT, and an alpha of NaN after which every answer is noise."""
    changes, message = LORA_CONFIGS[name]
    model = convert(make_tiny_llama(), CONFIG)
    inject_lora(model, require_peft().LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    tensors, metadata = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    values = metadata["lora_config"] | changes if isinstance(changes, dict) else changes
    save_tensors(tmp_path / "fam.safetensors", tensors, metadata | {"lora_config": values})
    with pytest.raises(TransformerFamError, match=message):
        FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama())


def test_adapter_of_no_architecture_fits_no_model(model):
    """Would catch a memory that is put into any model, since nothing says where it belongs."""
    adapter = FamAdapter.from_model(model)
    adapter.architecture = {}
    with pytest.raises(StateMismatchError, match="another model: class is None there and 'LlamaForCausalLM' here"):
        adapter.apply(make_tiny_llama())


def test_adapter_with_nan_is_refused(model, tmp_path):
    """Would catch a memory that was saved after its training broke."""
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    tensors, metadata = load_tensors(tmp_path / "fam.safetensors", "adapter", 1)
    save_tensors(tmp_path / "fam.safetensors", {"prompt": tensors["prompt"] * float("nan")}, metadata)
    with pytest.raises(CorruptFileError, match="has numbers in prompt that are not finite"):
        FamAdapter.from_pretrained(tmp_path)


# A run's own files


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = folder.with_suffix(".toml")
    recipe.write_text(RECIPE)
    run("train", recipe, "--output", folder)
    return recipe, folder


@pytest.mark.parametrize("content", ['{"model": {"ba', "", "[]", "3", '{"flour": 500}', "\xff"])
def test_recipe_that_is_cut_is_named(finished, content):
    """Would catch a traceback of json from a folder whose disk was full."""
    recipe, folder = finished
    path = folder / "recipe.json"
    before = path.read_bytes()
    path.write_text(content, encoding="latin-1")
    text = run("train", recipe, "--output", folder, "--resume", status=2)
    assert "recipe.json is cut or damaged" in text or "recipe.json is not a recipe of this package" in text
    with pytest.raises(CorruptFileError, match="recipe.json is"):
        recipe_of_run(folder)
    path.write_bytes(before)


@pytest.mark.parametrize(
    "line",
    [
        *("my note", "[1]", "3", '{"steps": 1}', '{"step": "two"}', "{}", '{"step": 1', '{"step": NaN}'),
        *('{"step": true}', '{"step": 0}', '{"step": 1.5}', '{"step": -1}', '{"step": Infinity}', '{"step": null}'),
    ],
)
def test_log_with_foreign_lines_is_left_alone(finished, line):
    """Would catch lines that are dropped, with all that follow them, when a run is resumed."""
    recipe, folder = finished
    log = folder / "log.jsonl"
    before = log.read_text()
    first, rest = before.split("\n", 1)
    log.write_text(f"{first}\n{line}\n{rest}")
    assert "line 2 of" in run("train", recipe, "--output", folder, "--resume", status=2)
    assert log.read_text() == f"{first}\n{line}\n{rest}"
    log.write_text(before)


def test_log_that_ends_in_the_middle_of_a_step_is_cut(tmp_path):
    """Would catch a run that cannot be resumed after SIGKILL."""
    Trainer(small_recipe(schedule={"steps": 2}), tmp_path).run()
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "lo')
    assert last_log_row(log)["step"] == 1
    Trainer(small_recipe(schedule={"steps": 3}), tmp_path, resume=True).run()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1, 2]


@pytest.fixture
def damaged(finished):
    """Resume a run whose checkpoint is changed, and return what the command says."""
    recipe, folder = finished
    path = folder / "checkpoint.safetensors"
    before = path.read_bytes()

    def resume(tensors, metadata, has_names=True):
        old_tensors, old = load_tensors(path, "checkpoint", 1)
        assert old["tensor_names"] == sorted(old_tensors)
        if not has_names:  # as earlier versions wrote it
            del old["tensor_names"]
        progress = metadata.pop("progress", {})
        values = old | metadata | {"progress": old["progress"] | progress if isinstance(progress, dict) else progress}
        changed = {name: change(old_tensors.get(name)) for name, change in tensors.items()}
        save_tensors(path, {n: t for n, t in (old_tensors | changed).items() if t is not None}, values)
        return run("train", recipe, "--output", folder, "--resume", status=2)

    yield resume
    path.write_bytes(before)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"progress": None}, "progress is None, required is an object"),
        ({"progress": "now"}, "progress is now, required is an object"),
        *(
            ({"progress": {name: value}}, f"progress.{name} is {value}, required is an integer of at least 0")
            for name, value in (
                *(("step", value) for value in (2.5, True, -1, float("inf"), float("nan"), "2", None)),
                *((name, 2.5) for name in ("stage_idx", "steps_in_stage", "num_tokens")),
            )
        ),
        *(
            ({"progress": {name: value}}, f"progress.{name} is {value}, required is a finite number of at least 0")
            for name, value in (("seconds", True), ("seconds", -1), ("seconds", float("inf")), ("cpu_seconds", "2"))
        ),
        (
            {"progress": {"accuracies": ["a"]}},
            "progress.accuracies is ['a'], required is a list of numbers from 0 to 1",
        ),
        ({"progress": {"accuracies": [2]}}, "progress.accuracies is [2], required is a list of numbers from 0 to 1"),
        ({"progress": {"accuracies": None}}, "progress.accuracies is None, required is a list of numbers"),
        ({"progress": {"devices": 5}}, "progress.devices is 5, required is a list of names"),
        ({"progress": {"stage_idx": 99}}, "is of stage 99 of the curriculum, which has the stages 0 to 0"),
        ({"passing_started": "yes"}, "passing_started is yes, required is true or false"),
        ({"passed_keys": 3}, "passed_keys is 3, required is null, or a list with one key per row"),
        ({"passed_keys": [[3]]}, "passed_keys is [[3]], required is null, or a list with one key per row"),
        ({"passed_keys": [[[[3]]]]}, "passed_keys is [[[[3]]]], required is null, or a list with one key per row"),
        ({"passed_keys": [[[[3], ["a"]]]]}, "passed_keys is [[[[3], ['a']]]], required is null, or a list with one"),
        ({"passed_keys": [1, 2]}, "lacks the tensor passed_fam"),
        ({"num_shares": "x"}, "num_shares is x, required is an integer of at least 0"),
        ({"num_shares": 3}, "-1-of-3.safetensors does not exist"),
        ({"tensor_names": 3}, "tensor_names is 3, required is a list of names"),
    ],
)
def test_checkpoint_with_values_of_another_form_is_refused(damaged, metadata, message):
    """Would catch a run that is resumed at no step, and a traceback that names no file."""
    text = damaged({}, dict(metadata))
    assert "checkpoint" in text
    assert message in text


FIRST = "optimizer.0.exp_avg"


@pytest.mark.parametrize("has_names", [True, False])
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({FIRST: lambda _: None}, "optimizer.0.exp_avg|has exp_avg_sq, step of the optimizer's parameter 0"),
        ({FIRST: lambda old: old[..., :1]}, "optimizer.0.exp_avg is of shape"),
        ({FIRST: lambda old: old * float("nan")}, "has numbers in optimizer.0.exp_avg that are not finite"),
        ({"optimizer.99.exp_avg": lambda _: torch.zeros(2)}, "optimizer.99.exp_avg"),
        ({"torch_rng": lambda _: None}, "lacks the tensor torch_rng"),
        ({"torch_rng": lambda old: old[:5]}, "torch_rng is of shape"),
        ({"torch_rng": lambda old: old.float()}, "torch_rng is torch.float32, required is torch.uint8"),
        ({"model.more": lambda _: torch.zeros(2)}, "holds the weights of another model"),
        ({"more": lambda _: torch.zeros(2)}, "holds the tensor more, which is of nothing here"),
        ({"filler.ids": lambda _: torch.zeros(2)}, "lacks the tensor filler.keys"),
    ],
)
def test_checkpoint_with_other_tensors_is_refused(damaged, tensors, message, has_names):
    """Would catch an optimizer, or random numbers, that start again in the middle of a run."""
    text = damaged(tensors, {}, has_names)
    assert "checkpoint.safetensors" in text
    assert re.search(message, text)


@pytest.mark.parametrize("has_names", [True, False])
def test_checkpoint_without_its_optimizer_is_refused(damaged, finished, has_names):
    tensors, _ = load_tensors(finished[1] / "checkpoint.safetensors", "checkpoint", 1)
    names = [name for name in tensors if name.startswith("optimizer.")]
    assert re.search("optimizer", damaged({name: lambda _: None for name in names}, {}, has_names))
