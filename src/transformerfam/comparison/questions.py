"""What a comparison asks, question by question, and which rows answer it."""

import warnings
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from transformerfam.comparison.plan import UNTRAINED, Comparison, RunName
from transformerfam.reports.rows import Row
from transformerfam.reports.telling import Telling
from transformerfam.tasks.controls import control_of
from transformerfam.tasks.facts_evaluation import FactsEvaluation
from transformerfam.tasks.named_keys_evaluation import NamedKeysEvaluation
from transformerfam.tasks.passkey import filler_text, text_digest
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation

Place = tuple[Any, ...]
"""How a question is told: passkeys by `Telling`; texts by how many keys, or supports, they have."""

Asked = Mapping[Any, Mapping[str, Any]]
"""Questions of one place, seed and length: by what a row calls them, further fields that its answer has to have."""


class Questions:
    """The questions of a comparison.

    A row is an answer where it agrees with a question in all fields that it has; rows of earlier versions lack some.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._block_size, self._asked = cache(self._find_block_size), cache(self._find_asked)

    def require_askable(self) -> None:
        """Write every question down, so that what is wrong with one is said before anything is trained.

        Raises:
            TransformerFamError: a number is out of its range, or the filler cannot be read.
        """
        comparison = self.comparison
        _ = self._questions
        for run in comparison.runs:
            for system in comparison.rows_of(run):
                lengths = comparison.lengths_of(system)
                more = {"systems": comparison.rows_of(run)} if comparison.task == "passkey" else {}
                self.evaluation(run.seed, filler_lengths=lengths, **more)
        for seed in comparison.seeds:
            for place in self._places():
                for length in comparison.filler_tokens:
                    self._asked(place, seed, length, 1)
                    evaluation = self.evaluation(seed)
                    if isinstance(evaluation, FactsEvaluation):
                        for number in range(evaluation.num_texts):
                            evaluation.story(length, place[0], number)

    def require_readable(self, tokenizer: Any) -> None:
        """Check that a tokenizer has tokens for what is asked, and knows enough of the filler.

        Raises:
            TransformerFamError: it has not, or does not.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it does not know is said when it is asked
            self.evaluation(self.comparison.seeds[0]).text(tokenizer)

    def answers(self, rows: Iterable[Row]) -> list[Row]:
        """Return the rows that answer the comparison's questions."""
        return [row for row in rows if self._is_answer(row)]

    def num_answered(self, rows: Iterable[Row], run: RunName) -> int:
        """Return how many questions of a run `rows` answer, each once."""
        systems = self.comparison.rows_of(run)
        own = (row for row in rows if row.get("seed") == run.seed and row.get("system") in systems)
        return len(
            {(row["system"], row["filler_tokens"], self._place(row), self._name(row)) for row in self.answers(own)}
        )

    def num_asked(self, run: RunName) -> int:
        """Return how many questions a run is asked."""
        lengths = sum(len(self.comparison.lengths_of(system)) for system in self.comparison.rows_of(run))
        return lengths * self.comparison.num_questions

    def evaluation(self, seed: int, **options: Any) -> PasskeyEvaluation | NamedKeysEvaluation | FactsEvaluation:
        """Return the evaluation of a seed.

        Args:
            seed: of the questions.
            options: fields of the evaluation, in place of the comparison's.
        """
        comparison = self.comparison
        common: dict[str, Any] = {
            "filler_lengths": comparison.filler_tokens,
            "seed": seed,
            "batch_size": comparison.batch_size,
            "model_name": comparison.name,
            "filler": comparison.filler,
        }
        if comparison.task == "passkey":
            return PasskeyEvaluation(**common | {"num_keys": comparison.num_keys} | options)
        common["num_texts"] = comparison.num_keys
        if comparison.task == "named-keys":
            named = {"num_told": comparison.num_told, "num_retold": comparison.num_retold}
            return NamedKeysEvaluation(**common | named | {"apart": comparison.keys_apart} | options)
        facts = {"num_supports": comparison.num_supports, "num_sentences": comparison.num_sentences}
        return FactsEvaluation(**common | facts | options)

    def _is_answer(self, row: Row) -> bool:
        comparison = self.comparison
        if row["task"] != comparison.task or row["model"] != comparison.name:
            return False
        system, seed, length, place = row["system"], row["seed"], row["filler_tokens"], self._place(row)
        is_asked = system in comparison.systems and seed in comparison.seeds
        if not is_asked or length not in comparison.lengths_of(system) or place not in self._places():
            return False
        name = Path(comparison.filler).name
        if row.get("filler", name) != name or ("questions" in row and row["questions"] != self._questions):
            return False
        asked, own = self._asked(place, seed, length, self._block_size(system)), self._name(row)
        if None in own:
            return True
        return own in asked and all(row.get(field, value) == value for field, value in asked[own].items())

    def _place(self, row: Row) -> Place:
        if self.comparison.task == "passkey":
            return Telling.of_row(row)
        return (row["num_told" if self.comparison.task == "named-keys" else "num_supports"],)

    def _name(self, row: Row) -> tuple[int | None, ...]:
        """Return what tells the questions of one place and length apart."""
        names = {"passkey": ("key",), "named-keys": ("text", "order"), "facts": ("text",)}
        return tuple(row.get(name) for name in names[self.comparison.task])

    def _places(self) -> list[Place]:
        comparison = self.comparison
        if comparison.task == "passkey":
            return [Telling(prefix, is_overwritten) for prefix, is_overwritten in comparison.tellings]
        return [(n,) for n in (comparison.num_told if comparison.task == "named-keys" else comparison.num_supports)]

    @cached_property
    def _questions(self) -> str:
        """The field `questions` of the rows."""
        evaluation = self.evaluation(self.comparison.seeds[0])
        if isinstance(evaluation, PasskeyEvaluation):
            return evaluation.questions["questions"]
        return evaluation.questions(text_digest(filler_text(self.comparison.filler)))["questions"]

    def _find_asked(self, place: Place, seed: int, length: int, block_size: int) -> Asked:
        if isinstance(place, Telling):
            told = {"prefix_tokens": place.prefix_tokens, "overwritten": place.is_overwritten}
            evaluation = self.evaluation(seed, **told)
            assert isinstance(evaluation, PasskeyEvaluation)
            jitters = evaluation.jitters(length, block_size)
            found: dict[Any, dict[str, Any]] = {
                (key,): {"jitter": jitter} for key, jitter in zip(evaluation.keys, jitters, strict=True)
            }
            if place.is_overwritten:
                for fields, old_key in zip(found.values(), evaluation.old_keys, strict=True):
                    fields["old_key"] = old_key
            return found
        evaluation = self.evaluation(seed)
        if isinstance(evaluation, FactsEvaluation):
            return {(number,): {"num_sentences": evaluation.num_sentences} for number in range(evaluation.num_texts)}
        assert isinstance(evaluation, NamedKeysEvaluation)
        return {
            (number, order): {"key": key, "is_retold": name in keys.outdated}
            for number, keys in enumerate(evaluation.texts(place[0]))
            for order, (name, key) in enumerate(keys.newest.items())
        }

    def _find_block_size(self, system: str) -> int:
        control = control_of(system)
        name = system if control is None else control[0]
        recipe = self.comparison.recipe_of(RunName(name, self.comparison.seeds[0]))
        is_trained_fam = recipe.rival is None and self.comparison.system_of(name) != UNTRAINED
        return (recipe.reading_config if is_trained_fam else recipe.fam).block_size
