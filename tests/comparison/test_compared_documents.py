"""Comparisons by the loss on held-out texts: trained on texts, measured, resumed, shown with differences, drawn."""

from pathlib import Path

import pytest
from rich.console import Console
from training_recipes import ONE_STEP, one_step_on_texts

from transformerfam.comparison import load_comparison, run_one
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.questions import Questions
from transformerfam.comparison.report import comparison_tables
from transformerfam.comparison.run import ROWS_FILE, is_finished
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.reports.rows import read_rows

LINE = "The grass is green. The sky is blue. Here we go again. What is the pass key? 12345 is it.\n"
COMPARISON = """
recipe = "training.toml"
task = "documents"
systems = ["bswa", "fam", "rmt"]
num_documents = 3
document_tokens = 50
places = [0, 20]
far_tokens = 12
batch_size = 2
"""


@pytest.fixture
def path(tmp_path: Path, short_bytes: None) -> Path:
    """Write a small comparison on a text."""
    (tmp_path / "book.txt").write_text(LINE * 9)
    (tmp_path / "training.toml").write_text(one_step_on_texts(tmp_path / "book.txt"))
    path = tmp_path / "small.toml"
    path.write_text(f'{COMPARISON}[texts]\nbook = "{tmp_path / "book.txt"}"\n')
    return path


def test_systems_are_trained_on_texts_measured_and_compared(path: Path, tmp_path: Path) -> None:
    """Catches a run that is never done, documents that are measured twice, and tables or figures without a system."""
    comparison, rows = load_comparison(path), []
    for run in comparison.runs:
        run_one(comparison, run, tmp_path / "runs")
        file = tmp_path / "runs" / str(run) / ROWS_FILE
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:2]))
        run_one(comparison, run, tmp_path / "runs")  # measures what is missing alone
        own = read_rows([file])
        assert sum(row["task"] == "documents" for row in own) == 6
        assert Questions(comparison).num_answered(own, run) == Questions(comparison).num_asked(run) == 6
        assert is_finished(comparison, run, own)
        rows += own
    tables = comparison_tables(comparison, rows)
    assert [table.title for table in tables[:2]] == [
        "small: book, loss (nats per token), one seed",
        "small: book, loss minus that of bswa (nats per token), one seed",
    ]
    assert [table.row_count for table in tables[:2]] == [3, 2]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(tables[1])
    assert "empty" not in captured.get()
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    assert {"fam", "rmt"} <= set((tmp_path / "figure.svg").read_text().replace("<", ">").split(">"))


def test_rows_are_shown_without_the_texts_and_not_for_other_texts(path: Path, tmp_path: Path) -> None:
    """Catches a report that needs the data, and rows of another text that count."""
    comparison = load_comparison(path)
    run = comparison.runs[0]
    run_one(comparison, run, tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / str(run) / ROWS_FILE])

    def num_answered(texts: str) -> int:
        path.write_text(f'{COMPARISON}[texts]\nbook = "{texts}"\n')
        return Questions(load_comparison(path)).num_answered(rows, run)

    (tmp_path / "other.txt").write_text(LINE * 10)
    assert num_answered(str(tmp_path / "nowhere.txt")) == 6
    assert num_answered(str(tmp_path / "other.txt")) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ('compared_with="armt"', "compared_with is 'armt', required is one of systems"),
        ("places=[20,0]", r"places is \[20, 0\], required are numbers from 0"),
        ("places=[]", "systems, seeds or places is empty"),
        ("places=[0,0]", r"places is \[0, 0\]"),
        ("texts={}", "texts is empty"),
        ("num_keys=3", "num_keys is a key of task 'passkey', and task is 'documents'"),
        ('recipe.data.task="facts"', "facts"),
    ],
)
def test_numbers_that_no_comparison_can_have_are_refused(path: Path, change: str, match: str) -> None:
    """Catches a traceback, or a training that nothing can be compared after."""
    with pytest.raises(RecipeError, match=match):
        load_comparison(path, [change])


def test_recipe_without_texts_is_refused(path: Path, tmp_path: Path) -> None:
    """Catches systems that were trained on passkeys and are measured on novels."""
    (tmp_path / "training.toml").write_text(ONE_STEP + "curriculum = [{ filler_tokens = [8, 16] }]\n")
    with pytest.raises(RecipeError, match=r"does not teach it; give the recipe a section \[instructions\]"):
        load_comparison(path)


def test_texts_that_are_missing_or_short_are_refused_before_training(path: Path, tmp_path: Path) -> None:
    """Catches hours of training before the first document cannot be read."""
    for change, match in (
        ({"book": str(tmp_path / "nowhere.txt")}, "nowhere.txt"),
        ({"book": str(tmp_path / "short.txt")}, "required are"),
    ):
        (tmp_path / "short.txt").write_text(LINE)
        path.write_text(COMPARISON + "[texts]\n" + "".join(f'{name} = "{text}"\n' for name, text in change.items()))
        comparison = load_comparison(path)
        with pytest.raises(TransformerFamError, match=match):
            run_one(comparison, comparison.runs[0], tmp_path / "runs")
        assert not list(tmp_path.glob("runs/*/log.jsonl")) or not any(
            file.read_text() for file in tmp_path.glob("runs/*/log.jsonl")
        )
