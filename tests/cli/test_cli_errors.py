"""Every error of the command line is one line that says what to do, and none is a traceback."""

import builtins
import os
import subprocess
import sys
import typing

import pytest
from command_line import run
from tiny_models import PASSKEY_TEXT
from training_recipes import SMALLEST_TRAINING as RECIPE
from training_recipes import small_recipe
from typer.testing import CliRunner

import fam_command
from transformerfam.cli import demo as cli_demo
from transformerfam.cli import loading as cli_loading
from transformerfam.cli import make as cli_make
from transformerfam.cli import plan as cli_plan
from transformerfam.cli import report as cli_report
from transformerfam.cli.app import app, function_of
from transformerfam.cli.commands import all_commands
from transformerfam.cli.loading import named_with
from transformerfam.cli.progress import screen
from transformerfam.errors import NonFiniteLossError, RecipeError, TransformerFamError
from transformerfam.tasks.reading import generate_text
from transformerfam.tasks.text import encode
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.training.trainer import Trainer
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model


@pytest.fixture
def places(folder, tmp_path):
    """Make what commands are given here, by name."""
    (tmp_path / "book.txt").write_text(PASSKEY_TEXT)
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "bare.jsonl").write_text('{"task": "passkey"}\n')
    (tmp_path / "next.jsonl").write_text('{"task": "next-token", "model": 1, "first_token": "x"}\n')
    (tmp_path / "q.jsonl").write_text('{"text": "The sun is yellow.", "question": "Who?", "answers": []}\n')
    (tmp_path / "deep").write_text("a = " + "[" * 5000)
    (tmp_path / "deep.jsonl").write_text("[" * 5000 + "\n")
    (tmp_path / "run").mkdir()
    for name in ("fifo", "fifo.svg", "run/log.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    names = {"book": "book.txt", "recipe": "r.toml", "bare": "bare.jsonl", "next": "next.jsonl", "fifo": "fifo"}
    names |= {
        "questions": "q.jsonl",
        "deep": "deep",
        "deep_rows": "deep.jsonl",
        "run": "run",
        "figure": "fifo.svg",
        "link": "link",
    }
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
        (BrokenPipeError(32, "Broken pipe"), "output was closed before everything was printed"),
        (MemoryError(), "there is no room for this"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "there is no room for this"),
        (OverflowError("int too large"), "there is no room for this"),
    ],
)
def test_any_error_is_one_line_and_traceback_shows_its_place(monkeypatch, places, error, message):
    """Would catch a page of frames where a user needs a sentence, or no frames where a developer needs them."""
    monkeypatch.setattr(cli_loading, "load_model", raised(error))
    command = ["generate", "who?", "--model", str(places["folder"]), "--state", "s"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    for whole in (["--traceback", *command], [*command, "--traceback"]):
        shown = CliRunner().invoke(app, whole)
        assert shown.exit_code == 2
        assert "in fail" in shown.output
        assert message in " ".join(shown.output.split())


def test_traceback_behind_two_dashes_is_a_text(places, monkeypatch):
    """Would catch a question that cannot be put to the model."""
    asked = []
    monkeypatch.setattr(cli_loading, "load_model", lambda *_: (_ for _ in ()).throw(TransformerFamError("no")))
    monkeypatch.setattr(cli_loading, "find_device", lambda _: asked.append(1))
    result = CliRunner().invoke(app, ["generate", "--state", "s", "--", "--traceback"])
    assert (result.exit_code, asked) == (2, [1])
    assert "Traceback" not in result.output


def test_ctrl_c_with_nothing_to_save_ends_with_its_status(places, monkeypatch):
    """Would catch "Aborted!" and status 1, which a script takes for a failure."""
    monkeypatch.setattr(cli_loading, "load_model", raised(KeyboardInterrupt()))
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
        (("train", "{deep}"), "is not valid TOML"),
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
        (("demo", "--model", "{folder}", "--seed", f"{2**70}", "--tokens", "300"), "should be less than or equal to"),
        (
            ("evaluate", "passkey", "--filler-tokens", "1", "--output", "{tmp}/r", "--mentions", f"{2**40}"),
            "should be less than or equal to 10000",
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
    """Would catch tracebacks, and commands that hang."""
    text = run(*(argument.format(**places) for argument in arguments), status=2)
    assert message in text
    assert "unexpected" not in text
    assert "Traceback" not in text


def test_ctrl_c_while_modules_are_loaded_ends_without_a_traceback(monkeypatch, capsys):
    """Would catch a page of imports for whoever stops the command in its first seconds."""
    plain = builtins.__import__

    def interrupted(name, *arguments, **options):
        if name == "transformerfam.cli.app":
            raise KeyboardInterrupt
        return plain(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", interrupted)
        patch.setattr(sys, "argv", ["fam", "demo"])
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


@pytest.mark.parametrize(
    "written",
    [
        ["block_size = 16", "fam_key_bias=0"],
        ["fam_key_bias= 0.0", "block_size=0x10"],
        ["block_size=1_6", "fam_key_bias=-0.0", "fam_key_bias=0e0"],
    ],
)
def test_changes_have_one_name_however_they_are_written(written):
    """Catches rows of one system that are counted as those of several."""
    assert named_with("tiny", written, None) == "tiny block_size=16 fam_key_bias=0.0"
    assert named_with("tiny", ['fam_update="gated"'], "bfloat16") == "tiny fam_update=gated bfloat16"
    assert named_with("tiny", None, None) == "tiny"


def test_override_in_a_list_changes_that_item():
    """Would catch a refusal of the index that is there."""
    with pytest.raises(RecipeError, match="has '0' for a list of 0"):
        parse_overrides(["a=[]", "a.0=1"])
    assert parse_overrides(["a=[1,2]", "a.1=3"]) == {"a": [1, 3]}


COMMANDS = {
    ("plan",): ("tiny",),
    ("compare",): ("{recipe}", "--report"),
    ("read",): ("{book}", "--model", "{folder}", "--save", "{tmp}/s"),
    ("study",): ("{book}", "--model", "{folder}", "--save", "{tmp}/s"),
    ("generate",): ("Who?", "--model", "{folder}", "--state", "{tmp}/s"),
    ("chat",): ("--model", "{folder}"),
    ("serve",): ("--model", "{folder}", "--store", "{tmp}/memories"),
    ("demo",): ("--model", "{folder}"),
    ("evaluate", "passkey"): ("--filler-tokens", "9", "--model", "{folder}", "--output", "{tmp}/o"),
    ("evaluate", "answers"): ("{questions}", "--model", "{folder}", "--output", "{tmp}/o"),
    ("evaluate", "next-token"): ("{book}", "--model", "{folder}"),
    ("data", "export"): ("{questions}", "--output", "{tmp}/tasks"),
    ("evaluate", "documents"): ("{book}", "--model", "{folder}", "--output", "{tmp}/o"),
    ("report", "gap"): ("{bare}", "--fam", "fam", "--bswa", "bswa"),
    ("report", "attention"): ("--model", "{folder}", "--output", "{tmp}/pictures"),
    ("data", "make"): ("babilong", "--tokens", "999", "--model", "{folder}", "--output", "{tmp}/new"),
}
"""Commands with an option that is a number, each with what else it needs."""
SEVERAL = {"--filler-tokens": "9", "--prefix-tokens": "9", "--places": "9", "--layers": "0", "--heads": "0"}
"""Options that are read as numbers, with commas between them."""


def numeric_options():
    """Yield every option of the parser that is a number, or several, with its command and type."""
    for name, command in all_commands().items():
        for hint in typing.get_type_hints(function_of(command), include_extras=True).values():
            kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
            kinds = {kind, *typing.get_args(kind)} - {type(None)}
            names = [text for note in notes for text in (note.default, *(note.param_decls or ()))]
            option = next((text for text in names if str(text).startswith("--")), None)
            if kinds & {int, float} or option in SEVERAL:
                yield name, option, "several" if option in SEVERAL else min(kinds & {int, float}, key=str).__name__


NUMERIC = sorted(set(numeric_options()))


def test_every_command_with_a_number_is_tried():
    """Would catch a new command whose numbers are untested."""
    assert {name for name, _, _ in NUMERIC} == set(COMMANDS)
    assert {option for _, option, _ in NUMERIC} >= {"--seed", "--tokens", "--tflops", "--key", *SEVERAL}


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e400", str(2**70), "1.5", "x", ""])
def test_number_that_no_option_takes_is_refused_by_name(places, monkeypatch, value):
    """Would catch NaN hours, an overflow in torch, and a message that does not say which number is meant."""
    for module, name in (
        (cli_loading, "load_model"),
        (cli_demo, "prepare_demo"),
        (cli_report, "load_model"),
        (cli_plan, "make_plan"),
        (cli_make, "load_tokenizer"),
    ):
        monkeypatch.setattr(module, name, raised(AssertionError("the work was begun")))
    for name, option, kind in NUMERIC:
        if kind == "float" and value in ("1.5", str(2**70)):
            continue
        text = run(*name, *(part.format(**places) for part in COMMANDS[name]), f"{option}={value}", status=2)
        assert option in text, (name, option, text)
        assert "unexpected" not in text, (name, option, text)


def test_seed_of_any_size_is_taken(places):
    """Would catch an overflow where a seed is multiplied."""
    command = ("evaluate", "passkey", "--filler-tokens", "9", "--model", places["folder"], "--num-keys", 1)
    run(*command, "--output", places["tmp"] / "o", "--seed", 2**63 - 1)


def test_plan_refuses_layers_that_the_model_does_not_have():
    """Would catch the plan of a memory that no layer carries."""
    text = run("plan", "tiny", "--set", "fam_layers=[99]", status=2)
    assert "fam_layers names layer 99, the model has layers 0 to" in text


def test_average_does_not_take_the_place_of_what_it_averages(places):
    """Would catch a memory that is lost, its mean in its place."""
    adapters = [places["tmp"] / name for name in "ab"]
    for folder in adapters:
        FamAdapter.from_pretrained(places["folder"]).save_pretrained(folder)
    before = (adapters[0] / "fam.safetensors").read_bytes()
    (places["tmp"] / "alias").symlink_to(adapters[0])
    for output in (adapters[0], places["tmp"] / "alias", places["tmp"] / "b" / ".." / "a"):
        text = run("average", *adapters, "--output", output, "--overwrite", status=2)
        assert "is one of the memories that are averaged, which would be lost; choose another" in text
    assert (adapters[0] / "fam.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["base", "memory"])
def test_run_does_not_take_the_place_of_what_it_starts_from(places, name):
    """Would catch a model that is removed before it is loaded."""
    start = places["tmp"] / "start"
    run("train", places["recipe"], "--output", start, "--set", "schedule.steps=1")
    before = {path.name: path.stat().st_size for path in start.iterdir()}
    text = run("train", places["recipe"], "--output", start, "--overwrite", "--set", f"model.{name}={start}", status=2)
    assert f"is model.{name}, which the run starts from and would replace; train into another folder" in text
    assert {path.name: path.stat().st_size for path in start.iterdir()} == before


def test_gradient_that_overflows_in_all_is_said(tmp_path):
    """Would catch StopIteration where every gradient is finite and their length is not."""
    recipe = small_recipe(loss={"key": 1e21}, schedule={"steps": 1})
    with pytest.raises(NonFiniteLossError, match="gradient of all parameters together, whose length float32 does not"):
        Trainer(recipe, tmp_path).run()


def test_list_of_commands_needs_no_torch() -> None:
    """Catches an import that delays `fam --help` by seconds, and help that depends on how the command is called."""
    code = (
        "import sys\nfrom fam_command import main\nsys.argv = ['fam', '--help']\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == CliRunner().invoke(app, ["--help"], prog_name="fam").output
    by_module = [sys.executable, "-m", "transformerfam.cli", "--help"]
    assert "demo" in subprocess.run(by_module, check=True, capture_output=True, text=True).stdout
    nothing = subprocess.run([sys.executable, "-m", "transformerfam"], capture_output=True, text=True)
    assert (nothing.returncode, nothing.stderr) == (CliRunner().invoke(app, []).exit_code, "")
    with open("/dev/full", "w") as full:
        failed = subprocess.run(by_module, stdout=full, stderr=subprocess.PIPE, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
