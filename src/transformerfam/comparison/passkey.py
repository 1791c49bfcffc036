"""Passkeys compared: one key, given at the start, deeper, or after another one."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from rich.table import Table

from transformerfam.comparison.accuracy import AccuracyComparison
from transformerfam.comparison.figures import MAX_LINES, by_panel, plot_matrix
from transformerfam.comparison.plan import Asked, Asking
from transformerfam.comparison.report import Cell, current_rows
from transformerfam.errors import RecipeError
from transformerfam.reports.rows import Row
from transformerfam.reports.telling import Telling
from transformerfam.tasks.controls import SWAPPED
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation, finished_questions
from transformerfam.tasks.ranges import Integers


class PasskeyComparison(AccuracyComparison):
    """A comparison by passkeys that come back."""

    parted_by: ClassVar[tuple[str, ...]] = ("prefix_tokens", "overwritten_tokens")
    has_controls: ClassVar[bool] = True
    also_trained_by: ClassVar[tuple[str, ...]] = ("worded-keys",)

    task: Literal["passkey"] = "passkey"
    """What is asked."""

    prefix_tokens: Integers = (0,)
    """Tokens of filler in front of the sentences that give the key, that is, its depth; each number has questions of
    its own."""

    overwritten_tokens: Integers = ()
    """Tokens of filler between another key, which is given first, and the one that counts; each number has questions of
    its own."""

    @model_validator(mode="after")
    def _require_tellings(self) -> Self:
        if not self.kinds or min(self.kinds)[0] < 0:
            raise RecipeError("prefix_tokens and overwritten_tokens are empty or negative, required is one from 0 on")
        return self

    @property
    def kinds(self) -> list[Telling]:
        """How keys are given: tokens of filler before the key, and whether another key precedes those."""
        return [Telling(n) for n in self.prefix_tokens] + [
            Telling(n, is_overwritten=True) for n in self.overwritten_tokens
        ]

    def kind_of(self, row: Row) -> Telling:
        """Return how a row's key was given."""
        return Telling.of_row(row)

    def question_of(self, row: Row) -> tuple[int | None, ...]:
        """Return a row's key."""
        return (row.get("key"),)

    def evaluation(self, seed: int, **options: Any) -> PasskeyEvaluation:
        """Return what asks the questions of a seed; see `Comparison.evaluation`."""
        return PasskeyEvaluation(**self.common_options(seed) | {"num_keys": self.num_keys} | options)

    def asked(self, kind: Telling, seed: int, length: int, block_size: int) -> Asked:
        """Return the keys that are given in one way; see `Comparison.asked`."""
        evaluation = self.evaluation(seed, prefix_tokens=kind.prefix_tokens, overwritten=kind.is_overwritten)
        jitters = evaluation.jitters(length, block_size)
        found: dict[Any, dict[str, Any]] = {
            (key,): {"jitter": jitter} for key, jitter in zip(evaluation.keys, jitters, strict=True)
        }
        if kind.is_overwritten:
            for fields, old_key in zip(found.values(), evaluation.old_keys, strict=True):
                fields["old_key"] = old_key
        return found

    def questions_digest(self, length: int) -> str:
        """Return the field `questions` of its rows."""
        return self.evaluation(self.seeds[0]).questions["questions"]

    def ask(self, asking: Asking) -> Iterable[Row]:
        """Query keys given in one way after the other; see `Comparison.ask`."""
        return itertools.chain.from_iterable(
            self._evaluation_of(kind, asking).rows(asking.model, asking.tokenizer) for kind in self.kinds
        )

    def _evaluation_of(self, kind: Telling, asking: Asking) -> PasskeyEvaluation:
        run = asking.run

        def progress(done: int, total: int, state: Any) -> None:
            asking.update(self.kinds.index(kind) * total + done, len(self.kinds) * total, state)

        evaluation = self.evaluation(
            run.seed,
            filler_lengths=self.lengths_of(run.system),
            systems=self.rows_of(run),
            max_training_filler_tokens=asking.notes.get("max_training_filler_tokens"),
            prefix_tokens=kind.prefix_tokens,
            overwritten=kind.is_overwritten,
            progress=progress,
        )
        evaluation.finished = finished_questions(asking.answered, evaluation)
        return evaluation

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Return a table for each way of telling; with a swapped memory, what it says of the other text is under it."""
        found = super().tables(rows)
        for kind, table in zip(self.kinds, found, strict=True):
            own = [row for row in current_rows(self, rows) if row["task"] == self.task and self.kind_of(row) == kind]
            for system in (name for name in self.systems if name.endswith(SWAPPED)):
                answered = [row for row in own if row["system"] == system]
                if answered:
                    of_other = sum(self._key_of_memory(row) == row["answer"] for row in answered)
                    table.caption = f"{table.caption}; {system} says the other text's key {of_other:,} of "
                    table.caption += f"{len(answered):,} times"
        return found

    def _key_of_memory(self, row: Row) -> str:
        """Return the key of the text whose memory a row's text was given: the one before it in its batch."""
        keys = [str(key) for key in self.evaluation(row["seed"]).keys]
        idx = keys.index(str(row["key"]))
        first = idx - idx % self.batch_size
        batch = keys[first : first + self.batch_size]
        return batch[idx - first - 1]

    def title_of(self, kind: Telling) -> str:
        """Return what is right, by how keys are given."""
        if len(self.kinds) == 1:
            return "passkeys recalled"
        before = "another key" if kind.is_overwritten else "the start"
        return f"passkeys recalled, given {kind.prefix_tokens:,} tokens after {before}"

    def plot(self, rows: Sequence[Row], path: str | Path) -> None:
        """Draw one panel for each way of telling; of one way alone many variants are a matrix."""
        if len(self.kinds) == 1 and len(self.variants) > MAX_LINES:
            (found,) = super().panels(rows).values()
            plot_matrix(self.filler_tokens, found, path)
        else:
            super().plot(rows, path)

    def panels(self, rows: Sequence[Row]) -> Mapping[str, Mapping[str, Mapping[int, Cell]]]:
        """Return the cells of every panel, by its title; of one way of telling a panel is a kind of system."""
        found = super().panels(rows)
        return found if len(found) > 1 else by_panel(*found.values())
