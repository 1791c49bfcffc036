"""Your own questions compared: systems that were trained alike answer what a file asks about its texts."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.table import Table

from transformerfam.comparison.figures import draw_shares
from transformerfam.comparison.filler import FillerComparison
from transformerfam.comparison.plan import Asked, Asking
from transformerfam.comparison.report import cells, current_rows
from transformerfam.reports.answers import answers_tables, worth
from transformerfam.reports.figure import length_axis
from transformerfam.reports.rows import Row
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import TEMPLATE, AnswersEvaluation
from transformerfam.tasks.filler import filler_text, text_digest
from transformerfam.tasks.ranges import Count, Integers


class AnswersComparison(FillerComparison):
    """A comparison by the questions of a file, as `fam evaluate answers` asks them."""

    parted_by: ClassVar[tuple[str, ...]] = ()
    has_controls: ClassVar[bool] = True

    task: Literal["answers"] = "answers"
    """What is asked."""

    questions: str
    """JSON lines, in the form of `fam evaluate answers`."""

    filler_tokens: Integers = (0,)
    """Tokens of filler around every text, which has its own place in it."""

    filler: str = "persuasion"
    """What the texts are hidden in: a novel of the package, or a UTF-8 file."""

    max_new_tokens: Count = 32
    """Tokens of an answer at most."""

    template: str = TEMPLATE
    """What a question looks like, with `{question}` in it."""

    @cached_property
    def _file(self) -> QuestionFile:
        return QuestionFile(self.questions)

    @cached_property
    def _filler_digest(self) -> str:
        return text_digest(filler_text(self.filler))

    @property
    def fields(self) -> Mapping[str, Any]:
        """The name of the file, which every answer has."""
        return {"file": Path(self.questions).name}

    @property
    def kinds(self) -> tuple[str, ...]:
        """One kind: the tables distinguish groups."""
        return ("",)

    def kind_of(self, row: Row) -> str:
        """Return the one kind."""
        return ""

    def question_of(self, row: Row) -> tuple[Any, ...]:
        """Return the name of a row's item."""
        return (row.get("item"),)

    @property
    def num_questions(self) -> int:
        """Questions of the file."""
        return len(self._file)

    def evaluation(self, seed: int, systems: Sequence[str], **options: Any) -> AnswersEvaluation:
        """Return what asks the questions.

        Args:
            seed: of the places in filler.
            systems: a system, and controls of it.
            **options: fields of the evaluation, in place of the comparison's.

        Raises:
            TransformerFamError: a number is out of its range, or the file cannot be read.
        """
        own: dict[str, Any] = {
            "filler": self.filler,
            "filler_lengths": self.filler_tokens,
            "max_new_tokens": self.max_new_tokens,
            "template": self.template,
            "batch_size": self.batch_size,
            "model_name": self.name,
        }
        return AnswersEvaluation(questions=self._file, seed=seed, systems=systems, **own | options)

    def asked(self, kind: str, seed: int, length: int, block_size: int) -> Asked | None:
        """Return the items of the file; see `Comparison.asked`."""
        if not Path(self.questions).exists():
            return None
        return {(item.name,): {} for places in self._file.texts() for item in self._file.items(places)}

    def require_askable(self) -> None:
        """Read the file; see `Comparison.require_askable`."""
        _ = self._file
        for run in self.runs:
            self.evaluation(run.seed, self.rows_of(run))

    def require_tokens(self, tokenizer: Any) -> None:
        """Check that a tokenizer knows enough of the filler; see `Comparison.require_tokens`."""
        self.evaluation(self.seeds[0], self.trained[:1]).require_tokens(tokenizer)

    def questions_digest(self, length: int) -> str | None:
        """Return the field `questions` of its rows of one length; None without the file."""
        if not Path(self.questions).exists():
            return None
        digest = self._filler_digest if length else None
        return self.evaluation(0, self.trained[:1]).fields_of_questions(digest, length)["questions"]

    def ask(self, asking: Asking) -> Iterator[Row]:
        """Ask what is not answered yet; see `Comparison.ask`."""
        run = asking.run
        evaluation = self.evaluation(run.seed, self.rows_of(run), filler_lengths=self.lengths_of(run.system))
        evaluation.finished = {(row["system"], row["item"], row["filler_tokens"]) for row in asking.answered}
        evaluation.progress = lambda done: asking.update(int(done), evaluation.num_questions, None)
        yield from evaluation.rows(asking.model, asking.tokenizer)

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Return a table of every group of questions and length; seeds are pooled."""
        return answers_tables(row for row in current_rows(self, rows) if row["task"] == self.task)

    def plot(self, rows: Sequence[Row], path: str | Path) -> None:
        """Draw how good the answers are by length, one panel a group; see `Comparison.plot`."""
        groups = sorted({row["group"] for row in current_rows(self, rows) if row["task"] == self.task})
        panels = {
            group or Path(self.questions).name: cells(
                self, (row for row in rows if row.get("group", group) == group), value=worth
            )
            for group in groups
        }
        lengths = sorted(self.filler_tokens)
        draw_shares(panels, lambda axes: length_axis(axes, lengths, "filler (tokens)", "F1, score or right"), path)
