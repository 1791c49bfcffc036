"""Comparisons by a file of questions: trained on instructions, queried with controls, resumed, shown and drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_recipes import ONE_STEP, one_step_on_texts

from transformerfam.comparison import load_comparison, run_one
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.questions import Questions
from transformerfam.comparison.report import comparison_tables
from transformerfam.comparison.run import ROWS_FILE, is_finished
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.reports.rows import read_rows

COMPARISON = """
recipe = "training.toml"
task = "answers"
questions = "{questions}"
systems = ["fam", "rmt", "fam_memory_zeroed"]
filler = "sentences"
filler_tokens = [0, 20]
max_new_tokens = 2
template = " {question} It is"
"""
ITEMS: list[dict[str, Any]] = [
    {"text": "The grass is green.", "question": "What is green?", "answers": ["The grass"], "group": "words"},
    {"text": "The sun is yellow.", "question": "What is it?", "choices": ["blue", "yellow"], "answers": ["yellow"]},
    {"text": "The sky is blue.", "question": "What is blue?", "prompt": " The", "answers": ["sky"], "scorer": "all"},
]


@pytest.fixture
def path(tmp_path: Path, short_bytes: None) -> Path:
    """Write a small comparison on a file of questions."""
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    lines = [{"prompt": "What is the grass? The grass is", "answer": " green."}] * 20
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "training.toml").write_text(one_step_on_texts(tmp_path / "lines.jsonl"))
    path = tmp_path / "small.toml"
    path.write_text(COMPARISON.replace("{questions}", str(tmp_path / "questions.jsonl")))
    return path


def test_systems_answer_beside_controls_and_resume(path: Path, tmp_path: Path) -> None:
    """Catches a run that is never done, questions that are asked twice, and a control without its rows."""
    comparison, rows = load_comparison(path), []
    for run in comparison.runs:
        run_one(comparison, run, tmp_path / "runs")
        file = tmp_path / "runs" / str(run) / ROWS_FILE
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
        run_one(comparison, run, tmp_path / "runs")
        own = read_rows([file])
        systems = {"fam", "fam_memory_zeroed"} if run.system == "fam" else {"rmt"}
        assert {row["system"] for row in own if row["task"] == "answers"} == systems
        assert sum(row["task"] == "answers" for row in own) == 6 * len(systems)
        assert Questions(comparison).num_answered(own, run) == Questions(comparison).num_asked(run)
        assert is_finished(comparison, run, own)
        rows += own
    tables = [table for table in comparison_tables(comparison, rows) if "tokens of filler" in str(table.title)]
    assert {str(table.title).partition(",")[0] for table in tables} == {"words", "questions.jsonl"}
    assert all(table.row_count == 3 for table in tables)
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    assert "rmt" in (tmp_path / "figure.svg").read_text()


def test_rows_of_other_questions_are_not_answers(path: Path, tmp_path: Path) -> None:
    """Catches a changed file, filler or template whose old rows count."""
    comparison = load_comparison(path)
    run = comparison.runs[0]
    run_one(comparison, run, tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / str(run) / ROWS_FILE])

    def num_answered(*changes: str) -> int:
        return Questions(load_comparison(path, list(changes))).num_answered(rows, run)

    assert num_answered() == 12
    assert num_answered('template=" {question}"') == 0
    assert num_answered('filler="persuasion"') == 6  # what is asked without filler is the same
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write(json.dumps(ITEMS[0] | {"question": "Is it?"}) + "\n")
    assert num_answered() == 0


def test_rows_are_shown_without_the_questions(path: Path, tmp_path: Path) -> None:
    """Catches a report that needs what it is a report of."""
    comparison = load_comparison(path)
    run_one(comparison, comparison.runs[0], tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / str(comparison.runs[0]) / ROWS_FILE])
    before = [str(table.title) for table in comparison_tables(comparison, rows)]
    (tmp_path / "questions.jsonl").unlink()
    assert [str(table.title) for table in comparison_tables(load_comparison(path), rows)] == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ('template="What"', "required is {question} in it"),
        ("num_keys=3", "num_keys is a key of task 'passkey', and task is 'answers'"),
        ("max_new_tokens=0", "max_new_tokens"),
        ("filler_tokens=[]", "filler_tokens is empty"),
        ('systems=["fam_memory_zeroed"]', "add fam to systems"),
        ('questions="nowhere.jsonl"', "cannot read 'nowhere.jsonl'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(path: Path, tmp_path: Path, change: str, match: str) -> None:
    """Catches hours of training before the first question cannot be asked."""
    with pytest.raises(TransformerFamError, match=match):
        run_one(comparison := load_comparison(path, [change]), comparison.runs[0], tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*/log.jsonl"))


def test_recipe_without_instructions_is_refused(path: Path, tmp_path: Path) -> None:
    """Catches systems that were trained on passkeys and are asked about manuals."""
    (tmp_path / "training.toml").write_text(ONE_STEP + "curriculum = [{ filler_tokens = [8, 16] }]\n")
    with pytest.raises(RecipeError, match=r"does not teach it; give the recipe a section \[instructions\]"):
        load_comparison(path)
