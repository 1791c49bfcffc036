"""What comparisons have in common that hide something in filler and ask for it after so many tokens."""

import abc
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from transformerfam.comparison.plan import Comparison, Kind
from transformerfam.reports.rows import Row
from transformerfam.tasks.ranges import Integer, Integers


class FillerComparison(Comparison):
    """A comparison by what is hidden in filler."""

    lengths_key: ClassVar[str] = "filler_tokens"

    filler_tokens: Integers
    """Lengths at which every run is asked."""

    filler: str = "sentences"
    """What is between a key and its question: the paper's sentences, a novel of the package, or a UTF-8 file."""

    max_filler_tokens: dict[str, Integer] = Field(default_factory=dict)
    """Systems that are asked up to this length alone, full attention for example."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of filler."""
        return self.filler_tokens

    def length_of(self, row: Row) -> int:
        """Return the filler of a row's question."""
        return int(row["filler_tokens"])

    def lengths_of(self, system: str) -> list[int]:
        """Return the lengths at which a system is asked."""
        limit = self.max_filler_tokens.get(system)
        return [length for length in self.filler_tokens if limit is None or length <= limit]

    @property
    def of_systems(self) -> list[str]:
        """The systems that other keys than `systems` name."""
        return [*self.max_filler_tokens, *super().of_systems]

    @property
    def fields(self) -> Mapping[str, Any]:
        """The name of the filler, which every answer has."""
        return {"filler": Path(self.filler).name}


class DrawnComparison(FillerComparison):
    """A comparison whose questions are drawn: every seed has its own."""

    num_keys: Integer = 25
    """Keys per run and length, or texts; every seed has its own."""

    @property
    def num_questions(self) -> int:
        """Questions that a run is asked at every length."""
        return self.num_keys * len(self.kinds)

    @abc.abstractmethod
    def evaluation(self, seed: int, **options: Any) -> Any:
        """Return what asks the questions of a seed.

        Args:
            seed: of the questions.
            **options: fields of the evaluation, in place of the comparison's.

        Raises:
            TransformerFamError: a number is out of its range.
        """

    def require_question(self, kind: Kind, seed: int, length: int) -> None:
        """Refuse numbers that no question of one kind, seed and length can have.

        Raises:
            TransformerFamError: names the number.
        """
        self.asked(kind, seed, length, block_size=1)

    def require_askable(self) -> None:
        """Write every question down; see `Comparison.require_askable`."""
        for run in self.runs:
            for system in self.rows_of(run):
                more = {"systems": self.rows_of(run)} if self.has_controls else {}
                self.evaluation(run.seed, filler_lengths=self.lengths_of(system), **more)
        for seed in self.seeds:
            for kind in self.kinds:
                for length in self.filler_tokens:
                    self.require_question(kind, seed, length)

    def require_tokens(self, tokenizer: Any) -> None:
        """Check that a tokenizer knows enough of the filler; see `Comparison.require_tokens`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it does not know is said when it is asked
            self.evaluation(self.seeds[0]).text(tokenizer)

    def common_options(self, seed: int) -> dict[str, Any]:
        """Return the options that all evaluations have."""
        return {
            "filler_lengths": self.filler_tokens,
            "seed": seed,
            "batch_size": self.batch_size,
            "model_name": self.name,
            "filler": self.filler,
        }
