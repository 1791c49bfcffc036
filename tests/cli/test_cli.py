"""The command `fam`: thin, but with errors in one line, standard input, and Ctrl-C that loses nothing."""

import contextlib
import json
import shutil

import pytest
import tiny_models
import torch
from command_line import run
from tiny_llama import make_tiny_llama
from tiny_models import PASSKEY_TEXT
from training_recipes import SMALLEST_TRAINING as RECIPE
from transformers import DynamicCache
from typer.testing import CliRunner

from transformerfam import FamConfig, FamState, convert
from transformerfam.cli import demo
from transformerfam.cli import read as cli_read
from transformerfam.cli.app import app
from transformerfam.decoder.cache_argument import as_cache
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.fam.memory import fam_parameters
from transformerfam.reports.rows import RowFile, read_rows
from transformerfam.tasks import provenance
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.reading import generate_text
from transformerfam.tasks.text import list_files
from transformerfam.training.recipe.sections import ModelSection
from transformerfam.training.tiny import build_tiny_model
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model, save_model


def run_passkey(folder, output, *more, **options):
    fixed = ("--model", folder, "--filler-tokens", "0,30", "--num-keys", 2, "--seed", 1, "--output", output)
    return run("evaluate", "passkey", *fixed, *more, **options)


def test_passkey_writes_rows_of_every_system(folder, tmp_path):
    """Would catch systems that share a model but not a row, and notes of the training that are lost."""
    output = tmp_path / "rows.jsonl"
    text = run_passkey(folder, output, "--system", "fam,fam_memory_zeroed,bswa,fam_untrained")
    rows = read_rows([output])
    assert len(rows) == 2 * 2 * 4
    assert {row["system"] for row in rows} == {"fam", "fam_memory_zeroed", "bswa", "fam_untrained"}
    assert {row["model"] for row in rows} == {str(folder)}
    assert {row["max_training_filler_tokens"] for row in rows if row["system"] == "fam"} == {512}
    assert "2 keys at every length" in text


def test_passkey_goes_on_where_a_killed_run_stopped(folder, tmp_path):
    """Would catch hours of questions asked again."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_passkey(folder, whole)
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:2]) + lines[2][:20])
    run_passkey(folder, cut)
    assert cut.read_text() == whole.read_text()
    run_passkey(folder, cut)
    assert cut.read_text() == whole.read_text()


def test_passkey_stopped_by_ctrl_c_keeps_its_rows_and_says_so(folder, tmp_path, monkeypatch):
    """Would catch an interrupted evaluation that leaves the user without a way on."""
    output = tmp_path / "rows.jsonl"
    append = RowFile.append

    def impatient(self, row):
        append(self, row)
        if len(self.rows) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "append", impatient)
        text = run_passkey(folder, output, status=130)
    assert "keeps 3 rows; run the same command again to go on" in text
    assert len(read_rows([output])) == 3
    run_passkey(folder, output)
    assert len(read_rows([output])) == 4


def test_passkey_is_told_as_the_options_say(folder, tmp_path):
    """Would catch an option that is taken and not handed on."""
    output, wording = tmp_path / "rows.jsonl", tmp_path / "mine.toml"
    wording.write_text('intro = " The sky is {key}."\nquestion = " What is the sky?"\nanswer = " The sky is {key}"\n')
    told = ("--prefix-tokens", "uniform", "--digits", 3, "--mentions", 2, "--wording", wording)
    fixed = ("--model", folder, "--filler-tokens", "200,300", "--num-keys", 2, "--output", output)
    run("evaluate", "passkey", *fixed, *told, "--system", "fam,fam_memory_swapped,fam_memory_initial")
    rows = read_rows([output])
    assert len(rows) == 2 * 2 * 3
    assert {row["placing"] for row in rows} == {"uniform"}
    assert {(len(str(row["key"])), row["num_mentions"], row["wording"]) for row in rows} == {(3, 2, "mine")}
    assert list(tmp_path.glob("*.reading.safetensors")) == []
    text = run("evaluate", "passkey", *fixed, "--prefix-tokens", "somewhere", status=2)
    assert "--prefix-tokens has 'somewhere', required are whole numbers" in text


def test_rows_of_a_gated_memory_say_so(tmp_path):
    """Would catch a gated memory counted among the paper's."""
    plain, gated = tmp_path / "plain", tmp_path / "gated"
    for folder, update in ((plain, "paper"), (gated, "gated")):
        save_model(*tiny_models.make_passkey_model(update=update), folder)
    for folder, asked, name in (
        (plain, (), "fam"),
        (gated, (), "fam_gated"),
        (gated, ("--system", "fam"), "fam_gated"),
    ):
        output = tmp_path / f"{folder.name}-{len(asked)}.jsonl"
        run_passkey(folder, output, *asked)
        assert {row["system"] for row in read_rows([output])} == {name}
    text = run_passkey(plain, tmp_path / "none.jsonl", "--system", "fam_gated", status=2)
    assert "the model's memory is not gated; take fam" in text


def test_passkey_takes_a_book(folder, tmp_path, book):
    """Would catch a filler option that takes the paper's sentences alone."""
    run_passkey(folder, tmp_path / "rows.jsonl", "--filler", book)
    assert {row["filler"] for row in read_rows([tmp_path / "rows.jsonl"])} == {"book.txt"}


def test_next_token_shows_a_table_and_appends_rows(folder, tmp_path, book):
    """Would catch a change of configuration that does not reach the model."""
    output = tmp_path / "rows.jsonl"
    options = ("--model", folder, "--num-tokens", 50, "--output", output)
    assert "0 to 50" in run("evaluate", "next-token", book, *options, "--system", "fam,bswa")
    run("evaluate", "next-token", book, *options, "--system", "bswa", "--set", "num_memory_segments=2")
    rows = list(read_rows([output]))
    assert len({row["loss"] for row in rows}) == 3
    assert [row["model"] for row in rows] == [str(folder), str(folder), f"{folder} num_memory_segments=2"]


@pytest.mark.parametrize("systems", ["fam_memory_zeroed", "fam,fam_memory_zeroed", "bswa,fam_memory_swapped"])
def test_next_token_refuses_a_control_before_anything_is_read(folder, tmp_path, book, systems):
    """Would catch a control that is left out of the rows without a word, or refused when the others are measured."""
    output = tmp_path / "rows.jsonl"
    text = run("evaluate", "next-token", book, "--model", folder, "--system", systems, "--output", output, status=2)
    assert f"system '{systems.split(',')[-1]}' belongs to the passkey task; take fam or bswa" in text
    assert not output.exists()


def test_passkey_takes_a_changed_configuration_under_its_own_name(folder, tmp_path):
    """Would catch an ablation whose rows pass for those of the shipped memory, or that changes nothing."""
    output = tmp_path / "rows.jsonl"
    run_passkey(folder, output)
    run_passkey(folder, output, "--set", "block_size=4")
    plain, changed = (
        [row for row in read_rows([output]) if ("block_size=4" in row["model"]) == is_changed]
        for is_changed in (False, True)
    )
    assert len(plain) == len(changed) == 4
    assert all(a["num_blocks"] < b["num_blocks"] for a, b in zip(plain, changed, strict=True))


def test_read_from_standard_input_equals_read_from_file(folder, tmp_path, book):
    """Would catch standard input that is decoded in another way, or read to its end first."""
    run("read", book, "--model", folder, "--save", tmp_path / "a.safetensors")
    run("read", "-", "--model", folder, "--save", tmp_path / "b.safetensors", stdin=PASSKEY_TEXT.encode())
    model, _ = load_model(folder)
    first, second = (FamState.load(tmp_path / name, model) for name in ("a.safetensors", "b.safetensors"))
    assert first.row_lengths == second.row_lengths
    assert first.fams.equal(second.fams)


def test_next_token_takes_a_folder_and_standard_input_as_the_file(folder, tmp_path, book):
    """Would catch texts that are measured in one way as a file and in another as a stream."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(book.read_bytes())
    output = tmp_path / "rows.jsonl"
    options = ("--model", folder, "--system", "fam", "--output", output)
    run("evaluate", "next-token", book, *options)
    run("evaluate", "next-token", tmp_path / "texts", *options)
    run("evaluate", "next-token", "-", *options, stdin=book.read_bytes())
    rows = read_rows([output])
    assert len(rows) == 3
    assert len({(row["loss"], row["num_tokens"]) for row in rows}) == 1
    again = run("evaluate", "next-token", "-", "--model", folder, "--system", "fam,bswa", status=2, stdin=b"text")
    assert "standard input can be read once" in again


def test_weights_are_held_in_another_type_on_request(folder, tmp_path, book):
    """Catches a type that is not heard, rounds the tables of RoPE, or is missing from the model's name in rows."""
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
    """Would catch an hour of reading lost, or a command to go on that reads tokens twice."""
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
    command = text[text.index("go on with: fam ") :].split()[4:]
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
        (("generate", "x", "--model", "{folder}", "--state", "{book}"), "no readable safetensors file"),
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
    """Would catch messages cut into several lines, which nobody can search for."""
    result = CliRunner().invoke(app, ["report", str(tmp_path / ("x" * 150))])
    assert len(result.output.strip().splitlines()) == 1


def test_name_of_a_file_in_brackets_is_printed_as_it_is(tmp_path):
    """Would catch a path swallowed as markup of the terminal."""
    assert "[red]x.jsonl" in run("report", tmp_path / "[red]x.jsonl", status=2)


# The demo


def test_demo_that_does_not_recall_ends_with_status_1(folder):
    """Would catch a demo that looks green whatever the model says."""
    text = run("demo", "--model", folder, "--tokens", 300, "--seed", 4, status=1)
    assert "FAM did not recall the key" in text
    for part in ("seed 4", "FAM", "BSWA", "peak resident memory", "tokens/s", "key/value cache of full attention"):
        assert part in text


def test_demo_that_recalls_ends_with_status_0(folder, monkeypatch):
    """Would catch a status that depends on BSWA, or on nothing."""
    answers = {}
    prepare = demo.prepare_demo
    monkeypatch.setattr(demo, "prepare_demo", lambda *a: answers.setdefault("demo", prepare(*a)))
    monkeypatch.setattr(demo, "greedy_tokens", lambda *a: demo.torch.tensor([answers["demo"].answer_ids]))
    assert "yes" in run("demo", "--model", folder, "--tokens", 300, "--seed", 4)


def test_demo_text_holds_page_key_and_rest_in_order(folder, monkeypatch):
    """Would catch a key that is never read, or read again at the end."""
    monkeypatch.setattr(demo, "memory_notes", lambda name: {"proven_prefix_tokens": 60, "proven_filler_tokens": 400})
    made = demo.prepare_demo(str(folder), seed=2)
    _, tokenizer = load_model(folder)
    text = tokenizer.decode(made.piece(0, made.num_tokens))
    assert made.num_tokens == 400
    assert 0 < len(made.page_ids) <= 60
    assert text.count(f"The pass key is {made.key}. Remember it. {made.key} is the pass key.") == 1
    pieces = [made.piece(start, 8) for start in range(0, 400, 8)]
    assert demo.torch.cat(pieces).equal(made.piece(0, 400))


def test_demo_seed_draws_key(folder):
    """Would catch a demo that cannot be repeated, or that always hides the same key."""
    keys = [demo.prepare_demo(str(folder), seed, 200).key for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_full_attention_cache_is_counted_as_transformers_allocates_it():
    """Would catch query heads counted for key heads."""
    section = ModelSection(
        base="tiny-random", num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    plain, cache = build_tiny_model(section, 60), DynamicCache()
    plain(demo.torch.zeros(1, 9, dtype=demo.torch.long), **as_cache(cache))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert demo.full_cache_bytes(convert(plain, FamConfig(block_size=4, fam_length=1)), 9, plain.dtype) == held


def test_peak_memory_is_that_of_this_process():
    """Would catch kilobytes reported as bytes."""
    demo.reset_peak_memory()
    assert 50e6 < demo.peak_memory() < 1e12


# Where rows come from


def test_provenance_names_commit_and_machine(tmp_path):
    """Would catch rows that nobody can trace."""
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
    with pytest.raises(ValueError, match="card.json is no JSON object"):
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
