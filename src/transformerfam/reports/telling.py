"""How passkeys are given, which distinguishes one curve from another."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NUM_DIGITS, WORDING = 5, "paper"
"""The paper's (D.1), and what rows say that have no such field."""


class Telling(NamedTuple):
    """How a run gives its keys."""

    prefix_tokens: int = 0
    """Tokens of filler in front of the last mention; 0 with `is_uniform`, where they differ from key to key."""
    is_overwritten: bool = False
    is_uniform: bool = False
    num_digits: int = NUM_DIGITS
    num_mentions: int = 1
    wording: str = WORDING

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Telling":
        """Return how the key of a row was given."""
        is_uniform = row.get("placing") == "uniform"
        return cls(
            0 if is_uniform else row.get("prefix_tokens", 0),
            "old_key" in row,
            is_uniform,
            row.get("num_digits", NUM_DIGITS),
            row.get("num_mentions", 1),
            row.get("wording", WORDING),
        )

    def label(self, others: Iterable["Telling"]) -> str:
        """Return what distinguishes this from the `others`."""
        others = list(others)
        parts = []
        if len({other[:3] for other in others}) > 1:
            before = "another key" if self.is_overwritten else "the start"
            parts.append(f"anywhere after {before}" if self.is_uniform else f"{self.prefix_tokens:,} after {before}")
        for name, shown in (
            ("num_digits", f"{self.num_digits} digits"),
            ("num_mentions", f"given {self.num_mentions} times"),
            ("wording", f"worded {self.wording}"),
        ):
            if len({getattr(other, name) for other in others}) > 1:
                parts.append(shown)
        return ", ".join(parts)
