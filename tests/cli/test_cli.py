"""The command `fam`: thin, but with errors in one line, standard input, and Ctrl-C that loses nothing."""

import contextlib
import json
import shutil

import pytest
import tiny_models
import torch
from command_line import run, run_passkey
from tiny_llama import make_tiny_llama
from tiny_models import PASSKEY_TEXT
from training_recipes import SMALLEST_TRAINING as RECIPE
from typer.testing import CliRunner

from transformerfam import FamConfig, FamState, convert
from transformerfam.cli import read as cli_read
from transformerfam.cli.app import app
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.fam.memory import fam_parameters
from transformerfam.reports.rows import read_rows
from transformerfam.tasks import provenance
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.reading import generate_text
from transformerfam.tasks.text import list_files
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model


def test_read_from_standard_input_equals_read_from_file(folder, tmp_path, book):
    """Would catch standard input that is decoded in another way, or read to its end first."""
    run("read", book, "--model", folder, "--save", tmp_path / "a.safetensors")
    run("read", "-", "--model", folder, "--save", tmp_path / "b.safetensors", stdin=PASSKEY_TEXT.encode())
    model, _ = load_model(folder)
    first, second = (FamState.load(tmp_path / name, model) for name in ("a.safetensors", "b.safetensors"))
    assert first.row_lengths == second.row_lengths
    assert first.fams.equal(second.fams)


def test_weights_are_held_in_another_type_on_request(folder, tmp_path, book):
    """Catches a type that is ignored, rounds the tables of RoPE, or is missing from the model's name in rows."""
    state, output = tmp_path / "s.safetensors", tmp_path / "rows.jsonl"
    half = ("--dtype", "bfloat16")
    run("read", book, "--model", folder, "--save", state, *half)
    run("generate", "The pass key is", "--state", state, "--model", folder, "--max-new-tokens", 2, *half)
    error = run("generate", "key", "--state", state, "--model", folder, status=2)
    assert "bfloat16" in error
    run_passkey(folder, output, *half)
    run_passkey(folder, output)
    assert [row["model"] for row in read_rows([output])] == [f"{folder} bfloat16"] * 4 + [str(folder)] * 4
    assert "--dtype is 'int8', required is one of" in run_passkey(folder, output, "--dtype", "int8", status=2)
    model, _ = load_model(folder)
    hold_weights_in("bfloat16", model)
    kept = [*fam_parameters(model), *model.model.rotary_emb.buffers()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_folder_is_read_file_after_file(folder, tmp_path):
    """Would catch files out of order, hidden ones, or words that are joined over the end of a file."""
    texts = {"a/1.txt": "The grass is green.", "a/2.txt": "The sky is blue.", "b.txt": "The sun is yellow."}
    for name, text in texts.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "texts" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "joined.txt").write_text("\n\n".join(texts.values()))
    run("read", tmp_path / "texts", "--model", folder, "--save", tmp_path / "a.safetensors")
    run("read", tmp_path / "joined.txt", "--model", folder, "--save", tmp_path / "b.safetensors")
    model, _ = load_model(folder)
    first, second = (FamState.load(tmp_path / name, model) for name in ("a.safetensors", "b.safetensors"))
    assert first.row_lengths == second.row_lengths
    assert all(one.keys.equal(two.keys) for one, two in zip(first.layers, second.layers, strict=True))
    (tmp_path / "texts" / "c.txt").write_bytes(b"good \xff")
    error = run("read", tmp_path / "texts", "--model", folder, "--save", tmp_path / "c.safetensors", status=2)
    assert "c.txt is not UTF-8" in error
    (tmp_path / "empty").mkdir()
    error = run("read", tmp_path / "empty", "--model", folder, "--save", tmp_path / "c.safetensors", status=2)
    assert "holds no file" in error


def test_generate_asks_in_the_chat_template(folder, tmp_path, book):
    """Would catch a template that is not used, or a missing one that is passed over."""
    state = tmp_path / "state.safetensors"
    run("read", book, "--model", folder, "--save", state)
    error = run("generate", "sky", "--model", folder, "--state", state, "--chat", status=2)
    assert "the tokenizer has no chat template" in error
    model, tokenizer = load_model(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}What is the {{ m['content'] }}? The {{ m['content'] }} is{% endfor %}"
    )
    question = "What is the pass key? The pass key is"
    states = [FamState.load(state, model) for _ in range(2)]
    in_chat = generate_text(model, tokenizer, "pass key", states[0], 8, chat=True)
    assert in_chat == generate_text(model, tokenizer, question, states[1], 8)


def test_read_stopped_by_ctrl_c_is_kept_and_goes_on(folder, tmp_path, book, monkeypatch):
    """Would catch an hour of reading lost, or a command to resume that reads tokens twice."""
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    run("read", book, "--model", folder, "--save", whole)

    @contextlib.contextmanager
    def impatient(description):
        def update(done, total, state):
            if done > 100:
                raise KeyboardInterrupt

        yield update

    with monkeypatch.context() as patch:
        patch.setattr(cli_read, "tokens_bar", impatient)
        text = run("read", book, "--model", folder, "--save", part, status=130)
    command = text[text.index("resume with: fam ") :].split()[3:]
    assert command[0] == "read"
    run(*command)
    model, _ = load_model(folder)
    first, second = FamState.load(whole, model), FamState.load(part, model)
    assert first.row_lengths == second.row_lengths
    assert (first.fams - second.fams).abs().max() < 1e-5


def test_generate_answers_and_leaves_the_saved_state(folder, tmp_path, book):
    """Would catch a second question that hears the first."""
    state = tmp_path / "s.safetensors"
    run("read", book, "--model", folder, "--save", state)
    before = state.read_bytes()
    ask = ("generate", "--model", folder, "--state", state, "--max-new-tokens", 4, " What is the pass key?")
    assert run(*ask) == run(*ask)
    assert state.read_bytes() == before


def test_convert_takes_a_preset_and_its_prompt_begins_as_a_text(folder, tmp_path):
    """Would catch a preset that is not taken, rows that stay at the mean embedding, and a short text for many rows."""
    text = "The sky is blue."
    shape = ("--set", "fam_length=9", "--set", "block_size=12")
    run("convert", folder, tmp_path / "new", *shape, "--prompt-text", text)
    model, tokenizer = load_model(tmp_path / "new")
    assert model.fam_config == FamConfig.preset("gated", fam_length=9, block_size=12, num_sink_tokens=4)
    ids = (tokenizer(text)["input_ids"] * 3)[:9]
    assert len(set(ids)) < 9  # the text is taken again where it ends
    expected = model.get_input_embeddings().weight[ids]
    assert bool((model.get_decoder().fam.prompt == expected).all())
    run("convert", folder, tmp_path / "paper", *shape, "--preset", "paper")
    assert load_model(tmp_path / "paper")[0].fam_config == FamConfig(fam_length=9, block_size=12)
    assert "there is no preset 'gate'" in run("convert", folder, tmp_path / "no", "--preset", "gate", status=2)


def test_convert_saves_a_model_that_load_model_takes(folder, tmp_path):
    """Would catch settings that are lost on the way to the folder."""
    assert "block_size 12, fam_length 3" in run(
        "convert", folder, tmp_path / "new", "--set", "block_size=12", "--set", "fam_length=3"
    )
    assert load_model(tmp_path / "new")[0].fam_config.block_size == 12


def test_train_resume_and_override(tmp_path, monkeypatch):
    """Would catch a recipe that trains from Python only."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    output = tmp_path / "run"
    assert "3 steps" in run("train", recipe, "--output", output)
    assert "5 steps" in run("train", recipe, "--output", output, "--resume", "--set", "schedule.steps=5")
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]
    load_model(output)


def test_average_of_two_runs_is_a_memory(tmp_path):
    """Would catch a mean that cannot be read, or that forgets what it is to be read with."""
    folders = [tmp_path / name for name in ("first", "second")]
    model = convert(make_tiny_llama(), FamConfig(block_size=16, fam_length=2))
    for folder in folders:
        FamAdapter.from_model(model).save_pretrained(folder)
    output = tmp_path / "mean"
    assert "mean of 2 memories" in run("average", *folders, "--output", output, "--set", "block_size=32")
    assert FamAdapter.from_pretrained(output).config.block_size == 32


def test_report_prints_and_draws(folder, tmp_path):
    """Would catch a report that needs anything but rows."""
    output = tmp_path / "rows.jsonl"
    run_passkey(folder, output)
    assert "Passkeys recalled" in run("report", output, "--figure", tmp_path / "f.svg", "--figure", tmp_path / "f.png")
    assert (tmp_path / "f.svg").is_file()
    assert (tmp_path / "f.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "passkey", "--output", "{tmp}/r", "--filler-tokens", "1,x"), "--filler-tokens has 'x'"),
        (("evaluate", "passkey", "--output", "{tmp}/r", "--filler-tokens", "9", "--model", "smolm2"), "mean smollm2?"),
        (("evaluate", "passkey", "--output", "{tmp}/r", "--filler-tokens", "9", "--system", "fan"), "no system 'fan'"),
        (("evaluate", "next-token", "{book}", "--model", "{folder}", "--system", "fam_memory_zeroed"), "passkey task"),
        (("evaluate", "next-token", "{tmp}/none.txt", "--model", "{folder}"), "cannot read"),
        (
            ("evaluate", "next-token", "{book}", "--model", "{folder}", "--set", "block_sise=4"),
            "did you mean block_size",
        ),
        (("read", "{latin}", "--model", "{folder}", "--save", "{tmp}/s"), "not UTF-8: byte 0xff at position 3"),
        (("read", "{empty}", "--model", "{folder}", "--save", "{tmp}/s"), "the text has 0 tokens"),
        (("read", "{book}", "--model", "{folder}", "--save", "{tmp}/none/s"), "could not write"),
        (("generate", "x", "--model", "{folder}", "--state", "{book}"), "not a readable safetensors file"),
        (("train", "{tmp}/none.toml"), "cannot read the recipe"),
        (("average", "{tmp}/none", "--output", "{tmp}/mean"), "1 memory cannot be averaged"),
        (("report", "{tmp}/none.jsonl"), "cannot read"),
        (("report", "{empty}"), "hold 0 rows and none is of a task that is reported"),
        (("demo", "--model", "{folder}", "--tokens", "5"), "tokens is 5, the key's page takes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, book, arguments, message):
    """Would catch a traceback, or a message that is cut by the width of the terminal."""
    (tmp_path / "latin.txt").write_bytes(b"The\xff")
    (tmp_path / "empty.txt").write_text("")
    places = {"tmp": tmp_path, "book": book, "folder": folder}
    places |= {"latin": tmp_path / "latin.txt", "empty": tmp_path / "empty.txt"}
    output = run(*(argument.format(**places) for argument in arguments), status=2)
    assert message in output
    assert "error: " in output
    assert "Traceback" not in output


def test_error_is_not_wrapped(folder, tmp_path):
    """Would catch messages cut into several lines, which cannot be searched for."""
    result = CliRunner().invoke(app, ["report", str(tmp_path / ("x" * 150))])
    assert len(result.output.strip().splitlines()) == 1


def test_name_of_a_file_in_brackets_is_printed_as_it_is(tmp_path):
    """Would catch a path swallowed as markup of the terminal."""
    assert "[red]x.jsonl" in run("report", tmp_path / "[red]x.jsonl", status=2)


def test_provenance_names_commit_and_machine(tmp_path):
    """Would catch rows that cannot be traced."""
    fields = provenance.provenance()
    assert set(fields) == {"schema", "version", "git_commit", "machine"}
    assert all(fields.values())


def test_card_goes_before_the_notes_of_training(folder, tmp_path):
    """Would catch a demo that does not know what its memory was proven for."""
    assert provenance.memory_notes(folder)["max_training_filler_tokens"] == 512
    tiny_models.save_passkey_model(tmp_path)
    (tmp_path / "card.json").write_text('{"proven_filler_tokens": 30000}')
    assert provenance.memory_notes(tmp_path)["proven_filler_tokens"] == 30_000
    assert provenance.memory_notes(tmp_path, "fam_untrained") == {}
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(ValueError, match="card.json is not a JSON object"):
        provenance.memory_notes(tmp_path)


def test_question_may_repeat_the_text_and_folders_options_do_not_count(folder, tmp_path, book):
    """Would catch a question that is taken for what was read, and a folder's own way of generating."""
    model = shutil.copytree(folder, tmp_path / "model")
    options = json.loads((model / "generation_config.json").read_text())
    options |= {"return_dict_in_generate": True, "use_cache": False, "stop_strings": ["x"], "repetition_penalty": 9.0}
    (model / "generation_config.json").write_text(json.dumps(options))
    text, state = tmp_path / "short.txt", tmp_path / "s.safetensors"
    text.write_text("The grass is green. The sky is blue.")
    run("read", text, "--model", folder, "--save", state)
    for question in ("The grass is green. The sky is blue. The sky is blue.", "The grass is green. The sky is blue."):
        expected = run("generate", question, "--state", state, "--model", folder, "--max-new-tokens", 9)
        assert run("generate", question, "--state", state, "--model", model, "--max-new-tokens", 9) == expected
        loaded, tokenizer = load_model(folder)
        ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
        reading = loaded.read(ids[:, :-1], FamState.load(state, loaded))
        assert reading.num_tokens_read == FamState.load(state, loaded).num_tokens_read + ids.shape[1] - 1
        said = greedy_tokens(loaded, ids[:, -1:], reading, 9, end_ids=[tokenizer.eos_token_id])
        assert expected.strip() == tokenizer.decode(said[0], skip_special_tokens=True).strip()


def test_linked_folders_are_read_and_what_is_no_file_is_said(folder, tmp_path):
    """Would catch a part of a folder that is left out without a word, and links that lead in a circle."""
    read = ("read", tmp_path / "texts", "--model", folder, "--save", tmp_path / "s")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("The sky is blue.")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book").symlink_to(tmp_path / "elsewhere")
    assert list_files(tmp_path / "texts") == [tmp_path / "texts" / "book" / "a.txt"]
    (tmp_path / "texts" / "up").symlink_to(tmp_path / "texts")
    assert "is a link to a folder that it is in" in run(*read, status=2)
    (tmp_path / "texts" / "up").unlink()
    (tmp_path / "texts" / "gone").symlink_to(tmp_path / "nothing")
    assert "gone is a link that leads nowhere" in run(*read, status=2)
