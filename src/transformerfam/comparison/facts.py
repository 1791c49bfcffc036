"""Facts compared: questions on stories that are hidden in a long text."""

from typing import Any, ClassVar, Literal

from transformerfam.comparison.accuracy import AccuracyComparison
from transformerfam.comparison.figures import mark_chance
from transformerfam.comparison.plan import Asked
from transformerfam.comparison.texts import TextsComparison
from transformerfam.reports.figure import length_axis
from transformerfam.reports.rows import Row
from transformerfam.tasks.facts import PLACES
from transformerfam.tasks.facts_evaluation import FactsEvaluation
from transformerfam.tasks.ranges import Integer, Integers


class FactsComparison(TextsComparison, AccuracyComparison):
    """A comparison by questions on hidden stories."""

    parted_by: ClassVar[tuple[str, ...]] = ("num_supports",)

    task: Literal["facts"] = "facts"
    """What is asked."""

    num_supports: Integers = (1, 2, 3)
    """Sentences from which an answer follows; every number has different texts."""

    num_sentences: Integer = 10
    """Sentences of a story."""

    @property
    def kinds(self) -> tuple[int, ...]:
        """Numbers of supports."""
        return self.num_supports

    def kind_of(self, row: Row) -> int | None:
        """Return the supports of a row's question."""
        return row.get("num_supports")

    def question_of(self, row: Row) -> tuple[int | None, ...]:
        """Return the number of a row's text."""
        return (row.get("text"),)

    def evaluation(self, seed: int, **options: Any) -> FactsEvaluation:
        """Return what asks the questions of a seed; see `Comparison.evaluation`."""
        own = {"num_supports": self.num_supports, "num_sentences": self.num_sentences}
        return FactsEvaluation(**self.common_options(seed) | own | options)

    def asked(self, kind: int, seed: int, length: int, block_size: int) -> Asked:
        """Return the questions of one number of supports; see `Comparison.asked`."""
        return {(number,): {"num_sentences": self.num_sentences} for number in range(self.num_keys)}

    def require_question(self, kind: int, seed: int, length: int) -> None:
        """Draw the stories, which refuses what no story can have."""
        evaluation = self.evaluation(seed)
        for number in range(self.num_keys):
            evaluation.story(length, kind, number)

    def title_of(self, kind: int) -> str:
        """Return what is right, by the number of supports."""
        return f"questions with {'one support' if kind == 1 else f'{kind} supports'} answered"

    def finish_panel(self, axes: Any) -> None:
        """Mark what guessing gives, and name the axes."""
        mark_chance(axes, 1 / len(PLACES))
        length_axis(axes, self.filler_tokens, "novel that the story is hidden in (tokens)", "answers right")
