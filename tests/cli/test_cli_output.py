"""What commands print: facts as JSON, tables in any width, notes that `-q` leaves out, library logs with `-v`."""

import json
import logging
import os

import pytest
from command_line import run, run_passkey
from rich.table import Table
from training_recipes import SMALLEST_TRAINING as RECIPE
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from transformerfam.cli import output as cli_output
from transformerfam.cli.app import app
from transformerfam.cli.output import print_json, print_table, table_facts
from transformerfam.cli.verbosity import LEVEL, TRANSFORMERS_VERBOSITY, Verbosity


def facts(*arguments, status=0):
    """Run a command with --json, and return the one object of standard output."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == status, (result.output, result.exception)
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def test_facts_of_a_reading_and_an_answer(folder, book, tmp_path):
    """Catches JSON that is not alone on standard output, or has other numbers than the sentence."""
    state = tmp_path / "a state \u2603.safetensors"
    read = facts("read", book, "--model", folder, "--save", state)
    assert read["state"] == str(state)
    assert read["file_bytes"] == state.stat().st_size
    assert 0 < read["num_tokens_read"] < 1000
    ask = ("generate", " What is the pass key?", "--model", folder, "--state", state, "--max-new-tokens", 3)
    answered = facts(*ask)
    assert answered["answer"].strip() == run(*ask)
    assert answered["num_tokens_read"] == read["num_tokens_read"]


def test_bswa_reads_and_answers_and_its_state_is_no_memory(folder, book, tmp_path):
    """Catches `--system` that is ignored, a state that the other system takes, and a rival that cannot read."""
    state, half = tmp_path / "s", tmp_path / "half"
    assert facts("read", book, "--model", folder, "--save", state, "--system", "bswa")["system"] == "bswa"
    ask = ("generate", " What is the pass key?", "--model", folder, "--state", state, "--max-new-tokens", 3)
    assert facts(*ask, "--system", "bswa")["system"] == "bswa"
    assert "error:" in run(*ask, status=2)
    refused = run("read", book, "--model", folder, "--save", half, "--system", "rmt", status=2)
    assert "--system is 'rmt', required is one of fam, bswa, fam_untrained" in refused
    gated = ("--save", half, "--system", "fam_gated")
    assert "memory is not gated" in run("read", book, "--model", folder, *gated, status=2)


def test_facts_of_models_trainings_and_rows(folder, tmp_path):
    """Catches a command whose --json fails, or whose numbers are texts."""
    new = tmp_path / "new"
    converted = facts("convert", folder, new, "--set", "block_size=12", "--set", "fam_length=3")
    assert (converted["folder"], converted["fam_config"]["block_size"]) == (str(new), 12)
    plan = facts("plan", folder, "--train", "none")
    assert plan["parameters"] > 1000
    assert plan["hours"] is None
    (tmp_path / "r.toml").write_text(RECIPE)
    trained = facts("train", tmp_path / "r.toml", "--output", tmp_path / "run")
    assert trained["steps"] == 3
    reported = facts("report", "training", tmp_path / "run", "--figure", tmp_path / "loss.svg")
    (row,) = reported["tables"][0]["rows"]
    assert (row["run"], row["steps"]) == ("run", "3")
    assert (tmp_path / "loss.svg").is_file()
    rows = tmp_path / "rows.jsonl"
    run_passkey(folder, rows)
    (table,) = facts("report", rows)["tables"]
    assert [line["filler tokens"] for line in table["rows"]] == ["0", "30"]


def test_facts_of_data(tmp_path):
    """Catches a list that has no sizes, or that needs what was not fetched."""
    listed = facts("data", "list", "--folder", tmp_path)
    assert {source["condition"] for source in listed["sources"]} == {"not fetched"}
    assert all(package["num_bytes"] > 0 for source in listed["sources"] for package in source["packages"])


def test_json_has_no_number_that_json_lacks(capsys):
    """Catches NaN, which most parsers refuse."""
    print_json({"loss": float("nan"), "sizes": (1.5, float("inf"))})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "sizes": [1.5, None]}


def wide_table():
    table = Table(title="[bold]Wide[/bold]", caption="what it says")
    table.add_column("system")
    for name in ("accuracy", "correlation", "interpretation"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("fam_memory_zeroed", "0.55 [0.40, 0.70]", "0.1", "unquestionably")
    return table


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_table_fits_any_width_and_loses_no_word(width, monkeypatch, capsys):
    """Catches lines beyond the terminal, cells that are cut, and a table that becomes a list without need."""
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(wide_table())
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(lines)
    assert all(word in text for word in ("fam_memory_zeroed", "[0.40,", "unquestionably", "interpretation", "Wide"))
    assert "\u2026" not in text
    assert max(map(len, lines)) <= max(width, 36)
    assert ("system: fam_memory_zeroed" in text) is (width < 66)


def test_facts_of_a_table_are_texts_without_markup():
    """Catches markup of the terminal in what programs read."""
    assert table_facts(wide_table()) == {
        "title": "Wide",
        "caption": "what it says",
        "rows": [
            {
                "system": "fam_memory_zeroed",
                "accuracy": "0.55 [0.40, 0.70]",
                "correlation": "0.1",
                "interpretation": "unquestionably",
            }
        ],
    }


def test_quiet_leaves_results_and_errors(folder, book, tmp_path):
    """Catches notes that `-q` prints, an error that it hides, and quiet that outlives its command."""
    (tmp_path / "s").write_text("mine")
    read = ["read", str(book), "--model", str(folder), "--save"]
    assert "error:" in CliRunner().invoke(app, ["-q", *read, str(tmp_path / "s"), "--overwrite"]).output
    result = CliRunner().invoke(app, [*read, str(tmp_path / "t"), "--quiet"])
    assert (result.exit_code, result.output) == (0, "")
    assert LEVEL.value is Verbosity.NORMAL
    assert (tmp_path / "t").is_file()
    for words, shown in ((["-q", "data", "list"], "books"), (["report", "-q", "none.jsonl"], "cannot read")):
        assert shown in CliRunner().invoke(app, words).output


def test_verbose_shows_what_libraries_log_and_ends_with_the_command(folder, book, tmp_path, monkeypatch):
    """Catches logs that do not show, and a level or variable that stays after the command."""
    monkeypatch.delenv(TRANSFORMERS_VERBOSITY, raising=False)
    noted = []

    def say(message, always=False):
        logging.getLogger("transformers.x").debug("too much")
        logging.getLogger("of.a.library").info("what it does")
        noted.append((os.environ[TRANSFORMERS_VERBOSITY], logging.getLogger("transformers").level))

    monkeypatch.setattr(cli_output, "say", say)
    before = logging.getLogger().level, logging.getLogger("transformers").level, list(logging.getLogger().handlers)
    read = ["read", str(book), "--model", str(folder), "--save", str(tmp_path / "s")]
    result = CliRunner().invoke(app, [*read, "-v"])
    assert "of.a.library: what it does" in result.stderr
    assert "too much" not in result.stderr
    assert noted == [("info", logging.INFO)]
    assert TRANSFORMERS_VERBOSITY not in os.environ
    after = logging.getLogger().level, logging.getLogger("transformers").level, list(logging.getLogger().handlers)
    assert after == before


def test_no_command_shows_bars_of_loading(tmp_path):
    """Catches "Loading weights" in a log."""
    transformers_logging.enable_progress_bar()
    try:
        run("data", "list", "--folder", tmp_path)
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.disable_progress_bar()
