"""A task of one file and one line in the registry is trained, evaluated, reported and drawn; nothing else changes."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from training_recipes import ONE_STEP

import transformerfam
from transformerfam.comparison import load_comparison, run_one
from transformerfam.comparison import report as comparison_report
from transformerfam.comparison import run as comparison_run
from transformerfam.comparison.accuracy import AccuracyComparison
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.plan import Asking
from transformerfam.comparison.report import cells, comparison_tables
from transformerfam.comparison.run import ROWS_FILE
from transformerfam.errors import RecipeError
from transformerfam.reports.rows import Row, read_rows
from transformerfam.tasks.batch import Held, Written
from transformerfam.tasks.batch import Row as TrainingRow
from transformerfam.tasks.filler import load_filler
from transformerfam.tasks.provenance import provenance, weights_of
from transformerfam.tasks.ranges import Count, Integers
from transformerfam.tasks.registry import TASKS, Task
from transformerfam.tasks.writing import TaskSection, Writer

TRAINING = f"""{ONE_STEP}curriculum = [{{ filler_tokens = [8, 16], data = {{ num_said = 3 }} }}]

[data]
task = "echo"
"""


class EchoSection(TaskSection):
    """What the toy is trained on."""

    task: Literal["echo"] = "echo"
    """Tokens, and the same tokens again."""
    num_said: Count = 2
    """Tokens that appear twice."""


class EchoWriter(Writer[EchoSection]):
    """Say some tokens, filler, and the same tokens again."""

    def __init__(self, section: EchoSection, tokenizer: Any, seed: int, ask_later: float) -> None:
        super().__init__(section, tokenizer, seed, ask_later)
        self.filler = load_filler(tokenizer, "sentences")

    def rows(
        self, draw: random.Random, step: int, num_filler: int, section: EchoSection, carried: Sequence[Held | None]
    ) -> Written:
        rows, num = [], section.num_said
        for _ in carried:
            ids, filler = draw.choices(range(50), k=num), self.filler.slice(draw.randrange(99), num_filler).tolist()
            rows.append(TrainingRow(ids + filler + ids, num, None, is_told=True, held=None, num_asked_tokens=num))
        return Written(rows, num + num_filler)


@dataclass
class EchoEvaluation:
    """Query the token in front of the question, after others."""

    seed: int
    lengths: Sequence[int]
    system: str
    name: str
    num_texts: int

    def text(self, tokenizer: Any) -> None:
        """Nothing is written."""

    def rows(self, model: Any, _: Any) -> Iterator[Row]:
        for length in self.lengths:
            for text in range(self.num_texts):
                draw = torch.Generator().manual_seed(self.seed + text)
                ids = torch.randint(50, (1, length + 1), generator=draw)
                said = int(model(input_ids=ids).logits[0, -1].argmax())
                yield {
                    "task": "echo",
                    "system": self.system,
                    "model": self.name,
                    "seed": self.seed,
                    "filler_tokens": length,
                    "text": text,
                    "times": 1,
                    "correct": said == int(ids[0, -1]),
                    **provenance(),
                    **weights_of(model),
                }


class EchoComparison(AccuracyComparison):
    """The toy."""

    parted_by: ClassVar[tuple[str, ...]] = ("times",)

    task: Literal["echo"] = "echo"
    times: Integers = (1,)

    @property
    def kinds(self) -> tuple[int, ...]:
        return self.times

    def kind_of(self, row: Row) -> int:
        found: int = row["times"]
        return found

    def question_of(self, row: Row) -> tuple[int | None, ...]:
        return (row["text"],)

    def evaluation(self, seed: int, **options: Any) -> EchoEvaluation:
        lengths = options.get("filler_lengths", self.filler_tokens)
        return EchoEvaluation(seed, lengths, options.get("system", "fam"), self.name, self.num_keys)

    def asked(self, kind: int, seed: int, length: int, block_size: int) -> Mapping[Any, Mapping[str, Any]]:
        return {(text,): {} for text in range(self.num_keys)}

    def questions_digest(self, length: int) -> str:
        return "echo"

    def ask(self, asking: Asking) -> Iterable[Row]:
        done = {(row["filler_tokens"], row["text"]) for row in asking.answered}
        for row in self.evaluation(asking.run.seed, system=asking.run.system).rows(asking.model, None):
            if (row["filler_tokens"], row["text"]) not in done:
                yield row


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TASKS, "echo", Task(EchoSection, EchoWriter, f"{__name__}:EchoComparison"))
    for module in (comparison_run, comparison_report):
        monkeypatch.setattr(module, "BYTES_LENGTHS", (8,))
    (tmp_path / "training.toml").write_text(TRAINING)
    path = tmp_path / "toy.toml"
    path.write_text(
        'recipe = "training.toml"\ntask = "echo"\nsystems = ["fam", "rmt"]\nfiller_tokens = [4, 20]\nnum_keys = 3\n'
    )
    return path


def test_toy_task_is_trained_asked_reported_and_drawn(path: Path, tmp_path: Path) -> None:
    """Catches a step of a comparison that knows the tasks by name."""
    comparison = load_comparison(path)
    rows = []
    for run in comparison.runs:
        run_one(comparison, run, tmp_path / "runs")
        file = tmp_path / "runs" / str(run) / ROWS_FILE
        own = read_rows([file])
        assert sum(row["task"] == "echo" for row in own) == 6
        file.write_text("".join(json.dumps(row) + "\n" for row in own[:4]))
        run_one(comparison, run, tmp_path / "runs")  # evaluates only what is missing
        again = read_rows([file])
        assert sum(row["task"] == "echo" for row in again) == 6
        rows += again
    found = cells(comparison, rows)
    for system in ("fam", "rmt"):
        for length in (4, 20):
            right = [
                row["correct"] for row in rows if (row.get("system"), row.get("filler_tokens")) == (system, length)
            ]
            assert found[system][length].mean == pytest.approx(sum(right) / 3)
    tables = comparison_tables(comparison, rows)
    assert tables[0].title == "toy: echo, one seed"
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    assert "rmt" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ('task="eccho"', "task is 'eccho', required is one of passkey, named-keys, facts, echo"),
        ("task=3", "task is 3, required is one of"),
        ("num_told=[2]", "num_told is a key of task 'named-keys', and task is 'echo'"),
        ('systems=["fam","fam_memory_zeroed"]', "fam_memory_zeroed is a control of the memory"),
        ("times=[1,1]", r"times is \[1, 1\], required are different ones"),
        ("time=[1]", "unknown key time in the recipe; did you mean times"),
    ],
)
def test_keys_of_a_comparison_are_those_of_its_task(path: Path, change: str, match: str) -> None:
    """Catches a key that another task has, and that this one leaves unread."""
    with pytest.raises(RecipeError, match=match):
        load_comparison(path, [change])


def test_names_of_tasks_stand_in_their_own_files_alone() -> None:
    """Catches a branch on a task's name."""
    folder = Path(transformerfam.__file__).parent / "comparison"
    for path in folder.glob("*.py"):
        names = re.findall(r"""["'](passkey|named-keys|facts)["']""", path.read_text())
        if path.stem not in ("load", "passkey", "named_keys", "facts"):
            assert names == [], path
        assert ".task ==" not in path.read_text() or path.stem in ("report", "figures", "named_keys"), path
