"""What a comparison asks, question by question, and which rows answer it."""

from collections.abc import Iterable
from functools import cache

from transformerfam.comparison.names import RunName
from transformerfam.comparison.plan import Comparison
from transformerfam.reports.rows import Row
from transformerfam.rivals import PRESETS
from transformerfam.tasks.controls import control_of


class Questions:
    """The questions of a comparison.

    A row is an answer where it agrees with a question in all fields that it has; rows of earlier versions lack some.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._block_size, self._asked = cache(self._find_block_size), cache(comparison.asked)
        self._digest = cache(comparison.questions_digest)

    def require_askable(self) -> None:
        """Write every question down, so that what is wrong with one is said before anything is trained.

        Raises:
            TransformerFamError: a number is out of its range, or the filler cannot be read.
        """
        for length in self.comparison.lengths:
            self._digest(length)
        self.comparison.require_askable()

    def answers(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows that answer the comparison's questions."""
        return [row for row in rows if self._is_answer(row)]

    def num_answered(self, rows: Iterable[Row], run: RunName) -> int:
        """Return how many questions of a run `rows` answer, each once."""
        comparison, systems = self.comparison, self.comparison.rows_of(run)
        own = (row for row in rows if row.get("seed") == run.seed and row.get("system") in systems)
        return len(
            {
                (row["system"], comparison.length_of(row), comparison.kind_of(row), comparison.question_of(row))
                for row in self.answers(own)
            }
        )

    def num_asked(self, run: RunName) -> int:
        """Return how many questions a run is asked."""
        lengths = sum(len(self.comparison.lengths_of(system)) for system in self.comparison.rows_of(run))
        return lengths * self.comparison.num_questions

    def _is_answer(self, row: Row) -> bool:
        comparison = self.comparison
        if row["task"] != comparison.task or row["model"] != comparison.name:
            return False
        system, seed, length, kind = row["system"], row["seed"], comparison.length_of(row), comparison.kind_of(row)
        is_asked = system in comparison.systems and seed in comparison.seeds
        if not is_asked or length not in comparison.lengths_of(system) or kind not in comparison.kinds:
            return False
        if any(row.get(field, value) != value for field, value in comparison.fields.items()):
            return False
        digest = self._digest(length)
        if digest is not None and row.get("questions", digest) != digest:
            return False
        asked, own = self._asked(kind, seed, length, self._block_size(system)), comparison.question_of(row)
        if asked is None or None in own:
            return True
        return own in asked and all(row.get(field, value) == value for field, value in asked[own].items())

    def _find_block_size(self, system: str) -> int:
        control = control_of(system)
        name = system if control is None else control[0]
        recipe = self.comparison.recipe_of(RunName(name, self.comparison.seeds[0]))
        is_trained_fam = self.comparison.system_of(name) in PRESETS
        return (recipe.reading_config if is_trained_fam else recipe.fam).block_size
