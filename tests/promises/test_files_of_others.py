"""A command replaces nothing that is not its own, and finished work only if it must."""

import json
import os
import stat
from pathlib import Path

import pytest
import tiny_models
from command_line import run
from peft import LoraConfig, get_peft_model
from tiny_llama import make_tiny_llama
from tiny_models import PASSKEY_TEXT
from training_recipes import SMALL_COMPARISON as SMALL
from training_recipes import SMALLEST_TRAINING as RECIPE

from transformerfam import FamConfig, FamState, convert
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files import save_tensors, write_text
from transformerfam.reports.figure import MARKS, new_figure, require_figure, save_figure
from transformerfam.reports.markdown import require_page, write_markdown
from transformerfam.reports.rows import RowFile
from transformerfam.training.recipe.toml import load_recipe
from transformerfam.training.run_folder import save_recipe
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model, save_model


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, without a last newline")
    return path


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"one\ntwo", b'{"a": 1}', b'{"task', b'{\n  "task": 1\n}', b"\xff\xfe", b'{"task": "a"}\nbut see X'],
)
def test_rows_are_not_written_into_a_file_of_something_else(tmp_path, content):
    """Would catch notes cut off because they look like a row that a killed run left unfinished."""
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    if content == b'{"task':  # the beginning of a row, and nothing else
        RowFile(path).__exit__(None, None, None)
        return
    with pytest.raises(CorruptFileError, match="is not a result row"):
        RowFile(path)
    assert path.read_bytes() == content


def test_last_row_without_its_newline_is_a_row(tmp_path):
    """Would catch an answer that is dropped, or joined to the next, since an editor took the last newline away."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "a"}\n{"task": "b"}')
    with RowFile(path) as rows:
        rows.append({"task": "c"})
    assert [json.loads(line)["task"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


def test_state_takes_the_place_of_states_alone(folder, notes, tmp_path):
    """Would catch `fam read notes.txt --save notes.txt`."""
    before = notes.read_bytes()
    assert "only a state may replace a state" in run("read", notes, "--model", folder, "--save", notes, status=2)
    assert notes.read_bytes() == before
    model, _ = load_model(folder)
    save_tensors(tmp_path / "other", {}, {"kind": "adapter", "format_version": 1})
    for path in (notes, tmp_path / "other", folder / "fam.safetensors", folder):
        with pytest.raises(TransformerFamError, match="only a state may replace"):
            model.init_state().save(path)


def test_finished_reading_is_overwritten_if_asked_for(folder, tmp_path):
    """Would catch a reading of hours that a second command replaces, or that cannot be replaced at all."""
    book, state = tmp_path / "book.txt", tmp_path / "s"
    book.write_text(PASSKEY_TEXT)
    read = ("read", book, "--model", folder, "--save", state)
    run(*read)
    before = state.stat()
    assert "holds a state already; add --overwrite" in run(*read, status=2)
    assert (state.stat().st_ino, state.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    run(*read, "--overwrite")
    run(*read, "--state", state)
    model, _ = load_model(folder)
    assert FamState.load(state, model).num_tokens_read == 2 * model.read(load_ids(folder)).num_tokens_read


def load_ids(folder):
    return load_model(folder)[1](PASSKEY_TEXT)["input_ids"]


def test_training_does_not_go_into_the_folder_of_something_else(folder, tmp_path):
    """Would catch the weights of the base model replaced by those of a run."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    base = tmp_path / "base"
    make_tiny_llama().save_pretrained(base)
    (base / "notes.txt").write_text("notes")
    before = bytes_of(base)
    text = run("train", recipe, "--output", base, status=2)
    assert "holds config.json, which is of no training run" in text
    assert bytes_of(base) == before


def test_finished_training_starts_over_with_overwrite(tmp_path):
    """Would catch a memory that is lost to a second start, also where its checkpoint was removed to save space."""
    recipe, output = tmp_path / "r.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    train = ("train", recipe, "--output", output)
    run(*train)
    assert "start over by --overwrite" in run(*train, status=2)
    (output / "checkpoint.safetensors").unlink()
    assert "start over by --overwrite" in run(*train, status=2)
    assert "2 steps" in run(*train, "--overwrite", "--set", "schedule.steps=2")
    assert [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()] == [0, 1]
    assert "give one of them" in run(*train, "--overwrite", "--resume", status=2)


def test_models_and_memories_take_the_place_of_their_kind_alone(folder, tmp_path):
    """Would catch `fam convert base base`, a converted model over a run, and a mean over a model."""
    base = tmp_path / "base"
    make_tiny_llama().save_pretrained(base)
    before = bytes_of(base)
    for target in (base, folder.parent):
        assert "it holds other files" in run("convert", folder, target, status=2)
    model, tokenizer = tiny_models.make_passkey_model()
    with pytest.raises(TransformerFamError, match="holds a model that is not of this package"):
        save_model(model, tokenizer, base)
    assert bytes_of(base) == before
    assert "add --overwrite" in run("convert", folder, folder, status=2)
    new = tmp_path / "new"
    for more in ((), ("--overwrite",)):
        run("convert", folder, new, "--set", "block_size=12", "--set", "fam_length=3", *more)
    memories = [tmp_path / "first", tmp_path / "second"]
    converted = convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2))
    for memory in memories:
        FamAdapter.from_model(converted).save_pretrained(memory)
    assert "it holds other files" in run("average", *memories, "--output", new, status=2)
    for more in ((), ("--overwrite",)):
        run("average", *memories, "--output", tmp_path / "mean", *more)
    assert "add --overwrite" in run("average", *memories, "--output", tmp_path / "mean", status=2)


def test_memory_does_not_take_the_place_of_a_peft_adapter(tmp_path):
    """Would catch another's LoRA that is gone, and a save that cannot be done again after it was broken off."""
    model = get_peft_model(make_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    before = bytes_of(tmp_path)
    adapter = FamAdapter.from_model(
        get_peft_model(convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2)), LoraConfig(r=2))
    )
    with pytest.raises(TransformerFamError, match="holds a PEFT adapter without a memory .*choose another folder"):
        adapter.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == before
    (tmp_path / "fam.safetensors").write_bytes(b"something else")
    with pytest.raises(TransformerFamError, match="only an adapter may replace an adapter"):
        adapter.save_pretrained(tmp_path)
    (tmp_path / "fam.safetensors").unlink()
    assert bytes_of(tmp_path) == before
    adapter.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "fam.safetensors").unlink()
    adapter.save_pretrained(tmp_path / "own")


FOREIGN_FIGURES = {
    "photo.png": b"\x89PNG\r\n\x1a\n a photo of transformerfam",
    "matplotlib.svg": b"<?xml version='1.0'?><dc:title>Matplotlib v3.11</dc:title>",
    "drawing.svg": b"<?xml version='1.0'?><svg><text>transformerfam</text></svg>",
    "paper.pdf": b"%PDF-1.4 /Title (transformerfam)",
    "notes.svg": b"see transformerfam",
}


@pytest.mark.parametrize("name", FOREIGN_FIGURES)
def test_figures_take_the_place_of_figures_of_this_package_alone(tmp_path, name):
    """Would catch `--figure photo.png`, and a figure of the user's own that matplotlib signed."""
    path = tmp_path / name
    path.write_bytes(FOREIGN_FIGURES[name])
    with new_figure(None, (2, 2)) as (figure, _), pytest.raises(TransformerFamError, match="figure of this package"):
        save_figure(figure, path)
    with pytest.raises(TransformerFamError, match="figure of this package"), new_figure(path, (2, 2)):
        pass
    rows = tmp_path / "rows.jsonl"
    assert "figure of this package" in run("report", rows, "--figure", path, status=2)  # before it reads the rows
    assert path.read_bytes() == FOREIGN_FIGURES[name]


def test_own_figures_are_replaced(tmp_path):
    with new_figure(None, (2, 2)) as (figure, _):
        for suffix in ("png", "svg", "pdf"):
            for _ in range(2):
                save_figure(figure, tmp_path / "sub" / f"new.{suffix}")
        (tmp_path / "sub" / "new.png").replace(tmp_path / "png.svg")
        with pytest.raises(TransformerFamError, match="is not a .svg figure of this package"):
            save_figure(figure, tmp_path / "png.svg")


@pytest.mark.parametrize(
    "content", ["# Notes\n", "**Important:** call Ann", "| my | table |\n| --- | --- |", "\n<!-- -->"]
)
def test_tables_take_the_place_of_tables_of_this_package_alone(tmp_path, content):
    """Would catch `--table notes.md`, whatever the notes begin with, and hours of training before it is refused."""
    notes, recipe = tmp_path / "notes.md", tmp_path / "c.toml"
    notes.write_text(content)
    with pytest.raises(TransformerFamError, match="does not begin with the line <!-- transformerfam: tables -->"):
        write_markdown([], notes)
    recipe.write_text(SMALL)
    (tmp_path / "training.toml").write_text(RECIPE)
    assert "does not begin with the line" in run("compare", recipe, "--table", notes, status=2)
    assert notes.read_text() == content
    write_markdown([], tmp_path / "tables.md")
    write_markdown([], tmp_path / "tables.md")


def test_committed_pages_and_figures_can_be_made_again():
    """Would catch a mark that the documents of this repository do not have."""
    root = Path(__file__).parents[2]
    for folder, kind in (("docs", "tables"), ("benchmarks", "benchmarks")):
        paths = [path for path in (root / folder / "results").rglob("*") if path.suffix in (".md", *MARKS)]
        assert len(paths) > 9
        for path in paths:
            if path.suffix == ".md":
                if kind == "benchmarks" or path.name.startswith(("compare_", "conversions_")):
                    require_page(path, kind)
            else:
                require_figure(path, tuple(MARKS))


@pytest.mark.parametrize("mode", [0o640, 0o600])
def test_files_keep_their_rights_and_links_stay(tmp_path, mode):
    """Would catch a state that a group can no longer read, and a link to another disk that becomes a file."""
    umask = os.umask(0o022)
    try:
        target, link = tmp_path / "disk" / "state", tmp_path / "link"
        target.parent.mkdir()
        link.symlink_to(target)
        for write in (
            lambda path: save_tensors(path, {}, {"kind": "state", "format_version": 1}),
            lambda path: write_text(path, "text"),
        ):
            write(link)
            assert stat.S_IMODE(target.stat().st_mode) == 0o644
            target.chmod(mode)
            write(link)
            assert stat.S_IMODE(target.stat().st_mode) == mode
            assert link.is_symlink()
            assert [path.name for path in target.parent.iterdir()] == ["state"]
            target.unlink()
        save_model(*tiny_models.make_passkey_model(), tmp_path / "model")
        for path in (tmp_path / "model").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
    finally:
        os.umask(umask)


def test_pictures_of_attention_go_into_a_folder_of_their_own(folder, tmp_path):
    """Would catch pictures and rows of something else replaced."""
    maps = tmp_path / "maps.png"
    maps.write_bytes(b"a map of the town")
    assert "no attention.jsonl of earlier pictures" in run(
        "report", "attention", "--model", folder, "--output", tmp_path, status=2
    )
    (tmp_path / "attention.jsonl").write_text("not rows")
    assert "is not a result row" in run("report", "attention", "--model", folder, "--output", tmp_path, status=2)
    assert maps.read_bytes() == b"a map of the town"


@pytest.mark.parametrize("name", ["attention.jsonl", "film.gif", "maps.png", "memory.svg"])
def test_pictures_of_attention_take_the_place_of_their_kind_alone(folder, tmp_path, name):
    """Would catch rows of an evaluation that are emptied, and a film of a holiday that is gone."""
    (tmp_path / "attention.jsonl").write_text('{"task": "attention"}\n')
    content = b'{"task": "passkey"}\n' if name == "attention.jsonl" else b"my own"
    (tmp_path / name).write_bytes(content)
    text = run("report", "attention", "--model", folder, "--output", tmp_path, status=2)
    assert "holds rows of task 'passkey'" in text or "figure of this package" in text
    assert (tmp_path / name).read_bytes() == content


def test_recipe_alone_makes_no_run_of_a_folder(tmp_path):
    """Would catch weights of something else replaced, since a recipe is next to them."""
    recipe, base = tmp_path / "r.toml", tmp_path / "base"
    recipe.write_text(RECIPE)
    make_tiny_llama().save_pretrained(base)
    save_recipe(base, load_recipe(recipe))
    before = bytes_of(base)
    for more in ((), ("--overwrite",)):
        assert "which is of no training run and would be lost" in run(
            "train", recipe, "--output", base, *more, status=2
        )
    model, tokenizer = tiny_models.make_passkey_model()
    with pytest.raises(TransformerFamError, match="holds a model that is not of this package"):
        save_model(model, tokenizer, base)
    (base / "fam.safetensors").write_bytes(b"something else")
    assert "not of this package" in run("train", recipe, "--output", base, "--overwrite", status=2)
    (base / "fam.safetensors").unlink()
    assert bytes_of(base) == before


def test_recipe_of_another_program_is_left_alone(tmp_path):
    """Would catch a folder taken for a run because it has a file of that name."""
    output = tmp_path / "cake"
    output.mkdir()
    (output / "recipe.json").write_text('{"flour": 500}')
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    assert "unknown key flour" in run("train", recipe, "--output", output, status=2)
    assert (output / "recipe.json").read_text() == '{"flour": 500}'
