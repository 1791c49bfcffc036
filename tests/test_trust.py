"""Nothing in a folder, recipe or comparison makes us run code, or write outside the folder that we were given."""

import builtins
import json

import pytest
import tiny_models
from command_line import run
from tiny_llama import make_tiny_llama

from transformerfam.comparison import load_comparison
from transformerfam.errors import CorruptFileError, RecipeError, TransformerFamError, UnsupportedModelError
from transformerfam.models import load_base, load_model
from transformerfam.plan import find_config

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a model, and fail where anybody asks whether its code may run, or runs it."""
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


def test_base_models_that_name_each_other_end(tmp_path):
    """Would catch an adapter whose base is another adapter, round and round."""
    from transformerfam import FamConfig, convert
    from transformerfam.adapter import FamAdapter

    model = convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2))
    for one, other in (("a", "b"), ("b", "a")):
        notes = {"base_model": str(tmp_path / other)}
        FamAdapter.from_model(model, notes=notes).save_pretrained(tmp_path / one)
    with pytest.raises(TransformerFamError, match="as its base model, and that is none"):
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
