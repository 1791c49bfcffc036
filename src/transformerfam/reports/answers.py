"""Questions answered, by group and system: means, with bootstrap 95 % intervals of F1, scores and right choices."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from transformerfam.errors import TransformerFamError
from transformerfam.reports.figure import GREYS, LINES, MARKERS, label_ends, length_axis, new_figure, save_figure
from transformerfam.reports.rows import Row, mixed_commits, require_alike

NUM_RESAMPLES = 1000
WITH_INTERVAL = ("f1", "correct", "score")
WORTH = "F1, score or right"
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
    low, high = bounds(values, seed)
    return f"{mean(values):.2f} [{low:.2f}, {high:.2f}]"


def bounds(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a mean, by resampling."""
    draw = Random(seed)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(NUM_RESAMPLES))
    return means[int(0.025 * NUM_RESAMPLES)], means[int(0.975 * NUM_RESAMPLES) - 1]


def worth(row: Mapping[str, Any]) -> float:
    """Return how good the answer of a row is, 0 to 1: whether it was the right choice, its score, or its F1."""
    return float(next(row[name] for name in ("correct", "score", "f1") if name in row))


def plot_answers(rows: Iterable[Row], path: str | Path) -> None:
    """Draw how good the answers of every system are, one panel a group: bars, or lines over lengths of filler.

    Args:
        rows: result rows; those of other tasks are left out.
        path: file to write; its suffix says how: .svg, .png or .pdf.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: there are no rows of answers, or the suffix is another one.
    """
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    rows = [row for row in rows if row["task"] == "answers"]
    several = len({row["model"] for row in rows}) > 1
    for row in rows:
        name = f"{row['model']}, {row['system']}" if several else row["system"]
        by_length = panels.setdefault(row["group"] or row["file"], {}).setdefault(name, {})
        by_length.setdefault(row["filler_tokens"], []).append(worth(row))
    if not panels:
        raise TransformerFamError(
            "there are 0 rows of answers, at least 1 is required; run `fam evaluate answers` first"
        )
    lengths = sorted({row["filler_tokens"] for row in rows})
    num_rows, num_columns = -(-len(panels) // 2), min(2, len(panels))
    most = max(map(len, panels.values()))
    height = 2.9 if len(lengths) > 1 else 0.9 + 0.3 * most
    with new_figure(path, (4.8 * num_columns, height * num_rows), num_rows, num_columns) as (figure, all_axes):
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, systems) in zip(all_axes, panels.items(), strict=False):
            axes.set_title(title, loc="left", fontsize=9)
            if len(lengths) > 1:
                label_ends(axes, [(_line(axes, i, found), name) for i, (name, found) in enumerate(systems.items())])
                length_axis(axes, lengths, "filler (tokens)", WORTH)
            else:
                _bars(axes, {name: found[lengths[0]] for name, found in systems.items()})
        save_figure(figure, path)


def _errors(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return how far the ends of intervals are from their means, below and above."""
    ends = [(mean(of_one), *bounds(of_one)) for of_one in values]
    return [[max(0.0, middle - low) for middle, low, _ in ends], [max(0.0, high - middle) for middle, _, high in ends]]


def _line(axes: Any, index: int, by_length: Mapping[int, Sequence[float]]) -> Any:
    lengths = sorted(by_length)
    values = [by_length[length] for length in lengths]
    style: dict[str, Any] = {"color": GREYS[index % len(GREYS)], "linestyle": LINES[index % len(LINES)]}
    style |= {"marker": MARKERS[index % len(MARKERS)], "markerfacecolor": "white", "clip_on": False}
    drawn = axes.errorbar(lengths, [mean(v) for v in values], yerr=_errors(values), elinewidth=0.6, capsize=2, **style)
    return drawn.lines[0]


def _bars(axes: Any, by_system: Mapping[str, Sequence[float]]) -> None:
    names, values = list(by_system)[::-1], list(by_system.values())[::-1]
    colors = ["#303030" if name.endswith(("fam", "fam_gated")) else "#a0a0a0" for name in names]
    error = {"elinewidth": 0.8, "capsize": 2}
    axes.barh(names, [mean(v) for v in values], xerr=_errors(values), color=colors, height=0.6, error_kw=error)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(WORTH)
    axes.spines[["top", "right"]].set_visible(False)
