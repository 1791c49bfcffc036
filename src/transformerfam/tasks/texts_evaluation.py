"""What the measures on texts with more than one key have in common: how many texts, how long, and for which rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.provenance import provenance


@dataclass(kw_only=True)
class TextsEvaluation:
    """Options of `NamedKeysEvaluation` and `FactsEvaluation`.

    Raises:
        TransformerFamError: a length or a number is out of its range.
    """

    filler_lengths: Sequence[int]
    """Tokens of filler, each at least 0."""

    num_texts: int = 10
    """Texts of every kind."""

    seed: int = 0
    system: str = "fam"
    model_name: str = "unnamed"
    filler: str = "sentences"
    batch_size: int = 10
    """Texts that are read side by side."""

    progress: Callable[[int, int, ReadingState], None] | None = None
    """Called with the tokens of filler done, those to do, and the state."""

    def __post_init__(self) -> None:
        self.require_numbers("filler_lengths", self.filler_lengths, 0)
        for name in ("num_texts", "batch_size"):
            self.require_numbers(name, [getattr(self, name)], 1)
        self.filler_lengths = sorted(set(self.filler_lengths))

    def require_numbers(self, name: str, values: Sequence[int], least: int) -> None:
        """Refuse an option without numbers, or with one below `least`."""
        if not values or min(values) < least:
            raise TransformerFamError(f"{name} is {list(values)}, required are one or more numbers of at least {least}")

    def moved(
        self, share: tuple[int, int], num_texts: int, num_read: int = 0, most: int | None = None
    ) -> Callable[[int, Any, ReadingState], None] | bool:
        """Return a callback for `progress` of `read` that reports to `progress` of these options.

        Args:
            share: tokens of filler that were read before, and those in all.
            num_texts: texts that are read side by side.
            num_read: tokens of each that were read before.
            most: tokens of filler of each at most, where a text has other tokens too.
        """
        report = self.progress
        if report is None:
            return False

        def move(done: int, _: Any, state: ReadingState) -> None:
            filler = num_read + done if most is None else min(most, num_read + done)
            report(share[0] + num_texts * filler, share[1], state)

        return move

    def row(self, task: str, filler: str, filler_tokens: int, text: int, **fields: Any) -> dict[str, Any]:
        """Return a row of one question; `fields` are those of its task."""
        return {
            "task": task,
            "system": self.system,
            "model": self.model_name,
            "seed": self.seed,
            "filler": filler,
            "filler_tokens": filler_tokens,
            "text": text,
            **fields,
            **provenance(),
        }
