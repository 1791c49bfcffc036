"""Questions answered, by group and system: means, with bootstrap 95 % intervals of F1, scores and right choices."""

from collections.abc import Iterable, Sequence
from random import Random
from statistics import mean

from rich.markup import escape
from rich.table import Table

from transformerfam.reports.rows import Row, mixed_commits, require_alike

NUM_RESAMPLES = 1000
WITH_INTERVAL = ("f1", "correct", "score")
SHARES = {"exact_match": "exact", "f1": "F1", "contains": "contains", "correct": "right", "score": "score"}


def answers_tables(rows: Iterable[Row]) -> list[Table]:
    """Return a table of every group of questions and length of filler, with a line for every system.

    "wrong" is the share of unanswerable questions that were answered all the same.

    Raises:
        StateMismatchError: rows of one model and system are of different weights or configurations.
    """
    known: dict[tuple[str, str, str, int], Row] = {}
    groups: dict[tuple[str, int, str, bool], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row["task"] != "answers":
            continue
        series = (str(row["model"]), row["system"])
        require_alike(row, known.setdefault((*series, row["questions"], row.get("seed", 0)), {}))
        group = (row["group"], row["filler_tokens"], row["questions"], "num_choices" in row)
        groups.setdefault(group, {}).setdefault(series, []).append(row)
    return [_table(key[0], key[1], groups[key]) for key in sorted(groups)]


def _table(group: str, filler_tokens: int, cells: dict[tuple[str, str], list[Row]]) -> Table:
    rows = [row for of_cell in cells.values() for row in of_cell]
    shown = [name for name in SHARES if any(name in row for row in rows if row["wanted"])]
    several = len({model for model, _ in cells}) > 1
    numbers = {len(of_cell) for of_cell in cells.values()}
    named = [escape(group) if group else rows[0]["file"], f"{filler_tokens:,} tokens of filler"]
    named += [f"{numbers.pop():,} questions"] if len(numbers) == 1 else []
    table = Table(title=", ".join(named), caption=mixed_commits(rows) or None)
    table.add_column("system", no_wrap=True, min_width=max(len(system) for _, system in cells))
    columns = ([] if not numbers else ["asked"]) + [SHARES[name] for name in shown]
    for name in (*columns, *(["wrong"] if any(not row["wanted"] for row in rows) else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for (model, system), of_cell in cells.items():
        values = []
        for name in shown:
            found = [float(row[name]) for row in of_cell if name in row]
            values.append(interval(found) if name in WITH_INTERVAL else f"{mean(found):.2f}" if found else "-")
        unanswerable = [float(not row["abstained"]) for row in of_cell if not row["wanted"]]
        if table.columns[-1].header == "wrong":
            values.append(f"{mean(unanswerable):.2f}" if unanswerable else "-")
        asked = [f"{len(of_cell):,}"] if numbers else []
        table.add_row(escape(f"{model}, {system}" if several else system), *asked, *values)
    return table


def interval(values: Sequence[float], seed: int = 0) -> str:
    """Return a mean with its 95 % interval by resampling; "-" without values."""
    if not values:
        return "-"
    draw = Random(seed)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES))
    low, high = means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES) - 1]
    return f"{mean(values):.2f} [{low:.2f}, {high:.2f}]"
