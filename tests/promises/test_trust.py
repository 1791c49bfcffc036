"""Nothing in a folder, recipe or comparison makes us run code, or write outside the folder that we were given."""

import builtins
import json
import os

import pytest
import tiny_models
from command_line import run
from tiny_llama import make_tiny_llama
from transformers import AutoTokenizer

from transformerfam import FamConfig, convert
from transformerfam.comparison import load_comparison
from transformerfam.errors import (
    CorruptFileError,
    MissingPackageError,
    RecipeError,
    TransformerFamError,
    UnsupportedModelError,
)
from transformerfam.tools.plan import find_config
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_base, load_model
from transformerfam.weights.pretrained import load_pretrained

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a model, and fail where its code is run, or permission for that is requested."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it asked"))
    path = tmp_path / "model"
    tiny_models.save_passkey_model(path)
    (path / "code.py").write_text(CODE + "class Model: pass\nclass Config: pass\nclass Tokenizer: pass\n")
    yield path
    assert not list(tmp_path.rglob("ran"))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("command", ["read", "generate", "passkey", "next-token", "convert", "plan", "demo"])
def test_code_of_a_model_folder_is_not_run_though_the_text_says_yes(folder, tmp_path, command):
    """Would catch transformers' prompt, which takes its answer from the text on standard input."""
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"})
    arguments = {
        "read": ("read", "-", "--model", folder, "--save", tmp_path / "s"),
        "generate": ("generate", "who?", "--model", folder, "--state", tmp_path / "s"),
        "passkey": ("evaluate", "passkey", "--model", folder, "--filler-tokens", 9, "--output", tmp_path / "r"),
        "next-token": ("evaluate", "next-token", "-", "--model", folder),
        "convert": ("convert", folder, tmp_path / "new"),
        "plan": ("plan", folder),
        "demo": ("demo", "--model", folder),
    }[command]
    text = run(*arguments, status=2, stdin="y\nyes, the text says\n")
    assert "needs its own code, auto_map in config.json" in text


def test_code_of_a_tokenizer_is_not_run(folder):
    """Would catch the second file that names code."""
    mapped = {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=mapped)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        UnsupportedModelError, match="auto_map in tokenizer_config.json, and no code of a folder is run"
    ):
        load_model(folder)


def test_model_that_transformers_has_itself_is_loaded_whatever_code_lies_beside_it(folder):
    """Would catch a refusal of the many models that came with code once and are in transformers now."""
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    load_model(folder)


@pytest.mark.parametrize("nested", [False, True])
def test_kernels_that_a_configuration_names_are_not_fetched(folder, nested):
    """Would catch compiled code of somebody's repository, run because config.json names it."""
    named = {"attn_implementation": "somebody/kernel"}
    change(folder / "config.json", **({"text_config": named} if nested else named))
    with pytest.raises(UnsupportedModelError, match="attn_implementation = 'somebody/kernel' in config.json"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "x"}'])
def test_whatever_from_pretrained_raises_is_an_error_of_this_package(folder, content):
    """Would catch a traceback from deep inside transformers."""
    (folder / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match="holds no model that can be read"):
        load_base(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_pipes_in_a_model_folder_are_refused(folder, name):
    """Would catch a command that waits for ever for a writer."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(TransformerFamError, match="it is a named pipe|has no trained memory|holds a memory without"):
        load_model(folder, "fam_untrained")
    with pytest.raises(CorruptFileError, match=f"{name} is not a readable file: it is a named pipe"):
        load_pretrained(AutoTokenizer, folder)


@pytest.mark.parametrize("base", [5, {}, ["a"], True, "[" * 5000, None])
def test_base_of_a_peft_folder_is_checked(tmp_path, base):
    """Would catch tracebacks, and a loader that recurses until Python stops it."""
    text = base if isinstance(base, str) else json.dumps({"base_model_name_or_path": base})
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(TransformerFamError, match="base_model_name_or_path|cannot be read .it is nested too deeply"):
        load_model(tmp_path)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "b"]])
def test_peft_folders_that_name_each_other_end(tmp_path, names):
    """Would catch an adapter whose base is itself, or another that names it."""
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        (tmp_path / name).mkdir(exist_ok=True)
        values = {"base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(TransformerFamError, match="which leads back to itself; required is the folder of a model"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("base", [5, ["a"], None])
def test_note_of_a_base_model_is_checked(tmp_path, base):
    """Would catch a traceback of Python's paths."""
    model = convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2))
    FamAdapter.from_model(model, notes={"base_model": base}).save_pretrained(tmp_path)
    with pytest.raises(TransformerFamError, match="holds a memory without its base model"):
        load_model(tmp_path)
    for name in (base, ""):
        with pytest.raises(TransformerFamError, match="required is one of tiny, smollm2, or the path of a folder"):
            load_model(name)


@pytest.mark.parametrize("method", ["hqq", "torchao"])
def test_package_that_is_not_installed_is_named(folder, method):
    """Would catch "copy it again" for a model that is whole."""

    class Quantized:
        @staticmethod
        def from_pretrained(*_, **__):
            raise ModuleNotFoundError(f"No module named {method!r}")

    with pytest.raises(MissingPackageError, match=f"needs a package that is not installed.*{method}.*install it"):
        load_pretrained(Quantized, folder)


def test_base_models_that_name_each_other_end(tmp_path):
    """Would catch an adapter whose base is another adapter, round and round."""
    model = convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2))
    for one, other in (("a", "b"), ("b", "a")):
        notes = {"base_model": str(tmp_path / other)}
        FamAdapter.from_model(model, notes=notes).save_pretrained(tmp_path / one)
    with pytest.raises(TransformerFamError, match="as its base model, which is not a model"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", "", ".hidden", "a\\b", "a\nb", "c:d"])
@pytest.mark.parametrize("key", ["name", "variants"])
def test_names_of_a_comparison_stay_in_its_folder(tmp_path, name, key):
    """Would catch runs, and what they overwrite, anywhere on the disk."""
    path = tmp_path / "c.toml"
    values = (
        f"name = {json.dumps(name)}\nvariants = {{}}"
        if key == "name"
        else f"variants = {{ {json.dumps(name)} = 'fam' }}"
    )
    path.write_text(f'{values}\nsystems = ["fam"]\nfiller_tokens = [8]\n[recipe]\n')
    with pytest.raises(RecipeError, match="is no name of a folder"):
        load_comparison(path)


def test_code_is_named_by_plan(folder):
    """Would catch a plan that runs the code of a folder to find its sizes."""
    change(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(TransformerFamError, match="auto_map"):
        find_config(str(folder))
