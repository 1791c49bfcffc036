"""What comparisons have in common that ask on texts, each of which holds several things to ask for."""

from collections.abc import Iterable
from typing import Any

from transformerfam.comparison.filler import DrawnComparison
from transformerfam.comparison.plan import Asking
from transformerfam.reports.rows import Row
from transformerfam.tasks.filler import filler_text, text_digest


class TextsComparison(DrawnComparison):
    """A comparison whose evaluation is a `TextsEvaluation`: its rows are asked all, and those that are new are kept."""

    def common_options(self, seed: int) -> dict[str, Any]:
        """Return the options that all evaluations of texts have."""
        return super().common_options(seed) | {"num_texts": self.num_keys}

    def questions_digest(self, length: int) -> str:
        """Return the field `questions` of its rows."""
        found: str = self.evaluation(self.seeds[0]).questions(text_digest(filler_text(self.filler)))["questions"]
        return found

    def ask(self, asking: Asking) -> Iterable[Row]:
        """Ask all, and leave out what is answered; see `Comparison.ask`."""
        run, lengths = asking.run, self.lengths_of(asking.run.system)
        evaluation = self.evaluation(run.seed, filler_lengths=lengths, system=run.system, progress=asking.update)
        done = {self._place_of(row) for row in asking.answered}
        rows = evaluation.rows(asking.model, asking.tokenizer)
        return (row for row in rows if self._place_of(row) not in done)

    def _place_of(self, row: Row) -> tuple[Any, ...]:
        return self.kind_of(row), row["filler_tokens"], self.question_of(row)
