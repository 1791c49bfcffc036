"""Logs of trainings as a table and a curve; answers as a figure; the questions to begin with."""

import json

import pytest
from command_line import run
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.reports.answers import plot_answers
from transformerfam.reports.training import log_name, plot_training, read_log, smoothed, training_table
from transformerfam.tasks.answers import QuestionFile


def write_log(folder, losses, **fields):
    folder.mkdir(parents=True)
    rows = [{"step": i, "loss": loss, "tokens": 10 * (i + 1), "seconds": 3.6} for i, loss in enumerate(losses)]
    for name, values in fields.items():
        for i, value in values.items():
            rows[i][name] = value
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_log_is_read_without_the_step_that_is_being_written(tmp_path):
    """Catches a report that fails while the training goes on, and one that passes over a damaged line."""
    folder = write_log(tmp_path / "run", [3.0, 2.0])
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [step["loss"] for step in read_log(folder)] == [3.0, 2.0]
    assert log_name(folder) == log_name(folder / "log.jsonl") == "run"
    (folder / "log.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(CorruptFileError, match="line 1 of .* is no step of a training"):
        read_log(folder)
    (folder / "log.jsonl").write_text("")
    with pytest.raises(CorruptFileError, match="holds no step yet"):
        read_log(folder)
    with pytest.raises(TransformerFamError, match="required is the folder of a run, or its log.jsonl"):
        read_log(tmp_path)


def test_table_has_the_ends_and_the_best(tmp_path):
    """Catches the last loss of one noisy step, the worst evaluation for the best, and a run of another name."""
    first = write_log(tmp_path / "a", [float(20 - i) for i in range(20)], validation_loss={9: 4.0, 19: 4.5})
    second = write_log(tmp_path / "b", [5.0])
    table = training_table({path.name: read_log(path) for path in (first, second)})
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells == [
        ("a", "20", "200", "0.00", "20.000", "1.500", "4.000"),
        ("b", "1", "10", "0.00", "5.000", "5.000", "-"),
    ]


def test_curve_names_its_runs_and_is_the_same_bytes_again(tmp_path):
    """Catches lines without names, and a figure that changes with every run."""
    logs = {
        "one": read_log(write_log(tmp_path / "one", [9.0 / (i + 1) for i in range(500)], validation_loss={499: 1.0})),
        "two": read_log(write_log(tmp_path / "two", [4.0, 3.0])),
    }
    for name in ("x.svg", "y.svg"):
        plot_training(logs, tmp_path / name)
    text = (tmp_path / "x.svg").read_text()
    assert text == (tmp_path / "y.svg").read_text()
    assert all(name in text for name in ("one", "two", "one, held-out texts", "steps"))
    steps, losses = smoothed(logs["one"])
    assert len(steps) == 50
    assert steps[0] == 5.5
    assert losses[0] == pytest.approx(sum(9.0 / (i + 1) for i in range(10)) / 10)
    assert smoothed(logs["two"]) == ([1, 2], [4.0, 3.0])


def answer_rows(lengths):
    return [
        {"task": "answers", "model": "m", "system": system, "group": group, "file": "q.jsonl", "filler_tokens": length}
        | {"f1": worth, "wanted": True}
        for system, worth in (("fam", 1.0), ("bswa", 0.25))
        for group in ("", "novels")
        for length in lengths
    ]


@pytest.mark.parametrize("lengths", [(0,), (512, 4096)])
def test_figure_of_answers_has_a_panel_a_group_and_names_its_systems(tmp_path, lengths):
    """Catches a figure of own questions that only passkeys have, and systems or groups that are left out."""
    plot_answers(answer_rows(lengths), tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    assert all(f">{name}<" in text for name in ("fam", "bswa", "novels", "q.jsonl", "F1, score or right"))
    with pytest.raises(TransformerFamError, match="there are 0 rows of answers"):
        plot_answers([], tmp_path / "f.svg")


def test_figure_of_two_tasks_is_refused(tmp_path):
    """Catches a figure of one task in the other's place."""
    rows = [row | {"seed": 0} for row in answer_rows((0,))] + [{"task": "passkey", "system": "fam", "model": "m"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the files hold both" in run("report", tmp_path / "rows.jsonl", "--figure", tmp_path / "f.svg", status=2)


def test_questions_to_begin_with_are_read_and_answered(tmp_path):
    """Catches a template that the command itself refuses, or that the model tiny cannot read."""
    printed = CliRunner().invoke(app, ["evaluate", "answers", "--template"])
    assert printed.exit_code == 0
    path, rows = tmp_path / "my questions \u2603.jsonl", tmp_path / "rows.jsonl"
    path.write_text(printed.stdout)
    assert len(QuestionFile(path)) == 4
    run("evaluate", "answers", path, "--output", rows, "--max-new-tokens", 6)
    answers = {row["item"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert answers["word-for-word"]["score"] == 1.0
    run("report", rows, "--figure", tmp_path / "f.png")
    assert (tmp_path / "f.png").is_file()
