"""Questions answered, by system and group: means with bootstrap intervals."""

from collections.abc import Iterable, Sequence
from random import Random
from statistics import mean

from rich.table import Table

from transformerfam.reports.rows import Row, mixed_commits, require_alike

NUM_RESAMPLES = 1000
SHARES = {"exact_match": "exact match", "f1": "F1", "contains": "contained", "correct": "right choice"}


def answers_table(rows: Iterable[Row]) -> Table | None:
    """Return the scores of every system, group and length of filler; None without rows of questions.

    "wrong" is the share of unanswerable questions that were answered all the same.

    Raises:
        StateMismatchError: rows of one model and system are of different weights or configurations.
    """
    rows = [row for row in rows if row["task"] == "answers"]
    if not rows:
        return None
    known: dict[tuple[str, str], Row] = {}
    cells: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        require_alike(row, known.setdefault((str(row["model"]), row["system"]), {}))
        cells.setdefault((row["group"], row["filler_tokens"], row["model"], row["system"]), []).append(row)
    shown = [name for name in SHARES if any(name in row for row in rows)]
    has_unanswerable = any(not row["wanted"] for row in rows)
    table = Table(title="Questions answered, with bootstrap 95 % intervals", caption=mixed_commits(rows) or None)
    for name in ("group", "filler tokens", "model", "system"):
        table.add_column(name, justify="right" if name == "filler tokens" else "left")
    for name in ("questions", *(SHARES[name] for name in shown), *(["wrong"] if has_unanswerable else [])):
        table.add_column(name, justify="right")
    for (group, length, model, system), of_cell in sorted(cells.items(), key=lambda cell: cell[0][:2]):
        values = [interval([float(row[name]) for row in of_cell if name in row]) for name in shown]
        if has_unanswerable:
            values.append(interval([float(not row["abstained"]) for row in of_cell if not row["wanted"]]))
        table.add_row(group or "-", f"{length:,}", model, system, f"{len(of_cell):,}", *values)
    return table


def interval(values: Sequence[float], seed: int = 0) -> str:
    """Return a mean with its 95 % interval by resampling; "-" without values."""
    if not values:
        return "-"
    draw = Random(seed)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES))
    low, high = means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES) - 1]
    return f"{mean(values):.2f} [{low:.2f}, {high:.2f}]"
