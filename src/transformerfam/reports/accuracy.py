"""The accuracies that follow from rows, each with its interval."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from transformerfam.reports.rows import Row, require_alike, was_right
from transformerfam.reports.telling import Telling

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


def wilson_interval(num_correct: int, num_questions: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Args:
        num_correct: right answers.
        num_questions: answers in all, at least 1.
    """
    assert 0 <= num_correct <= num_questions, "more right answers than questions"
    assert num_questions >= 1, "a share of nothing"
    share = num_correct / num_questions
    scale = 1 + Z_95**2 / num_questions
    middle = (share + Z_95**2 / (2 * num_questions)) / scale
    half = Z_95 * math.sqrt(share * (1 - share) / num_questions + Z_95**2 / (4 * num_questions**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


class Accuracy(NamedTuple):
    """The share of passkeys recalled at one length, with its 95 % Wilson interval."""

    filler_tokens: int
    num_correct: int
    num_questions: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Right answers over questions."""
        return self.num_correct / self.num_questions


class Series(NamedTuple):
    """What makes one curve: rows that differ in anything of this are not pooled."""

    model: str
    system: str
    filler: str
    telling: Telling = Telling()

    def label(self, others: Iterable["Series"]) -> str:
        """Return the shortest name that distinguishes this curve from the `others`: system, then what differs."""
        others = list(others)
        parts = [self.system]
        if len({series.model for series in others}) > 1:
            parts.insert(0, self.model)
        if len({series.filler for series in others}) > 1:
            parts.append(f"({self.filler})")
        if len({series.telling for series in others}) > 1:
            parts.append(self.telling.label([series.telling for series in others]))
        return " ".join(parts)


def accuracy_by_length(rows: Iterable[Row]) -> dict[Series, list[Accuracy]]:
    """Return every curve of the passkey rows, lengths ascending; rows of other tasks are left out.

    Raises:
        StateMismatchError: rows of one curve and seed are of different weights, configurations or questions.
    """
    counts: dict[Series, dict[int, list[int]]] = {}
    known: dict[tuple[Series, Any], Row] = {}
    for row in rows:
        if row["task"] != "passkey":
            continue
        series = Series(str(row["model"]), row["system"], row.get("filler", "sentences"), Telling.of_row(row))
        require_alike(row, known.setdefault((series, row.get("seed")), {}))
        count = counts.setdefault(series, {}).setdefault(row["filler_tokens"], [0, 0])
        count[0] += was_right(row)
        count[1] += 1
    return {
        series: [
            Accuracy(length, right, asked, *wilson_interval(right, asked))
            for length, (right, asked) in sorted(by_length.items())
        ]
        for series, by_length in sorted(counts.items())
    }
