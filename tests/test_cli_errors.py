"""Every error of the command line is one line that says what to do, and none is a traceback."""

import builtins
import os
import sys

import pytest
from command_line import run
from test_cli import RECIPE
from tiny_models import PASSKEY_TEXT
from typer.testing import CliRunner

import fam_command
from transformerfam import cli
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.models import load_model
from transformerfam.progress import screen
from transformerfam.tasks.reading import generate_text
from transformerfam.tasks.text import encode
from transformerfam.training.recipe_file import parse_overrides


@pytest.fixture
def places(folder, tmp_path):
    """Make what commands are given here, by name."""
    (tmp_path / "book.txt").write_text(PASSKEY_TEXT)
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "bare.jsonl").write_text('{"task": "passkey"}\n')
    (tmp_path / "next.jsonl").write_text('{"task": "next-token", "model": 1, "first_token": "x"}\n')
    (tmp_path / "deep").write_text("a = " + "[" * 5000)
    (tmp_path / "deep.jsonl").write_text("[" * 5000 + "\n")
    (tmp_path / "run").mkdir()
    for name in ("fifo", "fifo.svg", "run/log.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    names = {"book": "book.txt", "recipe": "r.toml", "bare": "bare.jsonl", "next": "next.jsonl", "fifo": "fifo"}
    names |= {"deep": "deep", "deep_rows": "deep.jsonl", "run": "run", "figure": "fifo.svg", "link": "link"}
    return {name: tmp_path / file for name, file in names.items()} | {"tmp": tmp_path, "folder": folder}


def raised(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("wheels came off"), "unexpected RuntimeError: wheels came off; please report it"),
        (KeyError("x"), "unexpected KeyError: 'x'; please report it"),
        (RecursionError("too deep"), "unexpected RecursionError"),
        (PermissionError(13, "Permission denied", "/x"), "cannot use /x (Permission denied); check the path"),
        (OSError(28, "No space left on device"), "(No space left on device); check the path, its rights and the free"),
        (BrokenPipeError(32, "Broken pipe"), "had no reader any more"),
        (MemoryError(), "there is no room for this"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "there is no room for this"),
        (OverflowError("int too large"), "there is no room for this"),
    ],
)
def test_any_error_is_one_line_and_traceback_shows_its_place(monkeypatch, places, error, message):
    """Would catch a page of frames where a user needs a sentence, or no frames where a developer needs them."""
    monkeypatch.setattr(cli, "load_model", raised(error))
    command = ["generate", "who?", "--model", str(places["folder"]), "--state", "s"]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    for whole in (["--traceback", *command], [*command, "--traceback"]):
        shown = CliRunner().invoke(cli.app, whole)
        assert shown.exit_code == 2
        assert "in fail" in shown.output
        assert message in " ".join(shown.output.split())


def test_traceback_behind_two_dashes_is_a_text(places, monkeypatch):
    """Would catch a question that cannot be asked."""
    asked = []
    monkeypatch.setattr(cli, "load_model", lambda *_: (_ for _ in ()).throw(TransformerFamError("no")))
    monkeypatch.setattr(cli, "find_device", lambda _: asked.append(1))
    result = CliRunner().invoke(cli.app, ["generate", "--state", "s", "--", "--traceback"])
    assert (result.exit_code, asked) == (2, [1])
    assert "Traceback" not in result.output


def test_ctrl_c_with_nothing_to_save_ends_with_its_status(places, monkeypatch):
    """Would catch "Aborted!" and status 1, which a script takes for a failure."""
    monkeypatch.setattr(cli, "load_model", raised(KeyboardInterrupt()))
    assert "interrupted" in run("generate", "who?", "--state", "s", status=130)


def test_usage_is_explained_as_before():
    """Would catch help, or a wrong option, reported as an unexpected error."""
    assert "Usage" in run("--help")
    assert "--traceback" in run("--help")
    assert "No such option" in run("read", "x", "--sav", "y", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("read", "{fifo}", "--model", "{folder}", "--save", "{tmp}/s"), "it is a named pipe"),
        (("read", "{book}", "--model", "{folder}", "--save", "{tmp}/s", "--state", "{fifo}"), "it is a named pipe"),
        (("evaluate", "next-token", "{fifo}", "--model", "{folder}"), "it is a named pipe"),
        (("evaluate", "next-token", "{book}", "--model", "{folder}", "--output", "{fifo}"), "it is a device or a pipe"),
        (
            ("evaluate", "next-token", "{book}", "--model", "{folder}", "--output", "/dev/null"),
            "it is a device or a pipe",
        ),
        (("read", "{book}", "--model", "{folder}", "--save", "{tmp}/s", "--state", "/dev/null"), "it is a device"),
        (("read", "/dev/null", "--model", "{folder}", "--save", "{tmp}/s"), "it is a device"),
        (("report", "/dev/null"), "it is a device"),
        (("report", "{bare}", "--figure", "{figure}"), "it is a device or a pipe"),
        (("train", "/dev/null"), "it is a device"),
        (("train", "{recipe}", "--output", "{run}"), "log.jsonl: it is a device or a pipe, required is a file"),
        (("read", "{link}", "--model", "{folder}", "--save", "{tmp}/s"), "it is a named pipe"),
        (("train", "{recipe}", "--set", "schedule.steps=" + "[" * 2000), "steps is '[["),
        (("report", "{deep_rows}"), "line 1 of"),
        (("train", "{deep}"), "is no valid TOML"),
        (("read", "", "--model", "{folder}", "--save", "{tmp}/s"), "the path is empty, required is a UTF-8 text"),
        (("read", "{book}", "--model", "", "--save", "{tmp}/s"), "model is '', required is one of tiny, smollm2"),
        (
            ("evaluate", "passkey", "--filler-tokens", "1", "--output", "{tmp}/r", "--wording", "{fifo}"),
            "it is a named pipe",
        ),
        (
            (*("evaluate", "passkey", "--filler-tokens", "1", "--output", "{tmp}/r"), "--filler", "{fifo}")
            + ("--model", "{folder}"),
            "it is a named pipe",
        ),
        (("train", "{fifo}"), "it is a named pipe"),
        (("compare", "{fifo}"), "it is a named pipe"),
        (("report", "{fifo}"), "it is a named pipe"),
        (("generate", "who?", "--model", "{folder}", "--state", "{fifo}"), "it is a named pipe"),
        (("report", "{bare}"), "a row lacks a field, or has it in another form (KeyError: "),
        (("report", "{next}"), "a row lacks a field, or has it in another form"),
        (
            ("evaluate", "passkey", "--filler-tokens", "1", "--output", "{bare}", "--model", "{folder}"),
            "a row lacks a field",
        ),
        (("train", "{recipe}", "--set", "schedule.curriculum.7.window=3"), "has '7' for a list of 1, required is"),
        (("train", "{recipe}", "--set", "schedule.curriculum.x.window=3"), "has 'x' for a list of 1, required is"),
        (("train", "{recipe}", "--set", "schedule.curriculum.-1=3"), "has '-1' for a list of 1, required is"),
        (
            ("train", "{recipe}", "--output", "{tmp}/t", "--set", f"model.hidden_size={2**40}"),
            "there is no room for this",
        ),
        (("train", "{recipe}", "--output", "{tmp}/t", "--set", f"schedule.seed={2**70}"), "is an integer below 2^63"),
        (("plan", "tiny", "--tokens", "1e9", "--tflops", "0"), "should be greater than or equal to"),
        (("report", "attention", "--output", "{tmp}/p", "--key", "-5"), "should be greater than or equal to 1"),
        (("demo", "--model", "{folder}", "--seed", f"{2**70}", "--tokens", "300"), "there is no room for this"),
        (
            ("evaluate", "passkey", "--filler-tokens", "1", "--output", "{tmp}/r", "--mentions", f"{2**40}"),
            "num_mentions is 1099511627776, required is at least 1, since a key is given, and at most 10000",
        ),
        (
            ("read", "{book}", "--model", "{folder}", "--save", "{tmp}/s", "--skip-tokens", "-5"),
            "greater than or equal to",
        ),
        (("read", "{tmp}/\udcff.txt", "--model", "{folder}", "--save", "{tmp}/s"), "cannot read"),
        (("read", "{tmp}/a\0b", "--model", "{folder}", "--save", "{tmp}/s"), "cannot read"),
        (("train", "{recipe}", "--output", "{book}/run"), "could not make the folder"),
        (("report", "attention", "--model", "{folder}", "--output", "{book}/x"), "could not make the folder"),
        (("average", "{folder}", "{folder}", "--output", "{book}"), "it is a file, required is a folder"),
    ],
)
def test_known_errors_say_what_to_do(places, arguments, message):
    """Would catch tracebacks, and commands that wait for ever."""
    text = run(*(argument.format(**places) for argument in arguments), status=2)
    assert message in text
    assert "unexpected" not in text
    assert "Traceback" not in text


def test_ctrl_c_while_modules_are_loaded_ends_without_a_traceback(monkeypatch, capsys):
    """Would catch a page of imports for whoever stops the command in its first seconds."""
    plain = builtins.__import__

    def interrupted(name, *arguments, **options):
        if name == "transformerfam.cli":
            raise KeyboardInterrupt
        return plain(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", interrupted)
        with pytest.raises(SystemExit) as caught:
            fam_command.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_question_that_is_not_utf8_is_refused(folder):
    """Would catch a tokenizer's error about its input's type."""
    _, tokenizer = load_model(folder)
    with pytest.raises(TransformerFamError, match=r"the text 'who \\udcff' is not UTF-8 at character 4"):
        encode(tokenizer, "who \udcff")


def test_chat_template_that_fails_is_named(folder):
    """Would catch an error of jinja."""
    model, tokenizer = load_model(folder)
    for template in ("{{ raise_exception('no system') }}", "{% for %}"):
        tokenizer.chat_template = template
        with pytest.raises(TransformerFamError, match="the tokenizer's chat template fails .*ask without --chat"):
            generate_text(model, tokenizer, "sky", model.init_state().detach(), 3, chat=True)


def test_message_with_what_the_terminal_cannot_show_is_shown(monkeypatch):
    """Would catch a message that is lost, or an error about the message, on a terminal of another encoding."""
    import io

    for encoding in ("ascii", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stderr", stream)
        screen().print("caf\u00e9 \udcff")
        stream.flush()
        assert rb"\udcff" in stream.buffer.getvalue()


def test_override_in_a_list_changes_that_item():
    """Would catch a refusal of the index that is there."""
    with pytest.raises(RecipeError, match="has '0' for a list of 0"):
        parse_overrides(["a=[]", "a.0=1"])
    assert parse_overrides(["a=[1,2]", "a.1=3"]) == {"a": [1, 3]}
