"""Passkey accuracy by length: a table for the terminal and a figure for paper."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from transformerfam.errors import TransformerFamError
from transformerfam.reports.accuracy import Accuracy, accuracy_by_length
from transformerfam.reports.figure import (
    GREYS,
    GUIDE,
    LINES,
    MARKERS,
    label_ends,
    length_axis,
    new_figure,
    save_figure,
)
from transformerfam.reports.rows import Row, mixed_commits


def passkey_table(rows: Iterable[Row]) -> Table | None:
    """Return accuracy by length with Wilson 95 % intervals, one column per system; None without passkey rows."""
    rows = [row for row in rows if row["task"] == "passkey"]
    curves = accuracy_by_length(rows)
    if not curves:
        return None
    numbers = sorted({point.num_questions for points in curves.values() for point in points})
    keys = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    said = [f"{keys} keys at every length", mixed_commits(rows)]
    table = Table(title="Passkeys recalled, with Wilson 95 % intervals", caption="; ".join(filter(None, said)))
    table.add_column("filler tokens", justify="right")
    by_length = {series: {point.filler_tokens: point for point in points} for series, points in curves.items()}
    for series in curves:
        table.add_column(series.label(curves), justify="right")
    for length in sorted({length for points in by_length.values() for length in points}):
        table.add_row(f"{length:,}", *(_cell(points.get(length)) for points in by_length.values()))
    return table


def _cell(point: Accuracy | None) -> str:
    if point is None:
        return "-"
    return f"{point.share:.2f} [{point.low:.2f}, {point.high:.2f}]"


def plot_passkey(rows: Iterable[Row], path: str | Path) -> None:
    """Draw accuracy by length, black on white, each line named at its end.

    Args:
        rows: result rows; those of other tasks are left out.
        path: file to write; its suffix says how: .svg, .png or .pdf.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: there are no passkey rows, or the suffix is another one.
    """
    rows = list(rows)
    curves = accuracy_by_length(rows)
    if not curves:
        raise TransformerFamError("there are 0 passkey rows, at least 1 is required; run `fam evaluate passkey` first")
    with new_figure(path, (6.4, 3.6)) as (figure, (axes,)):
        lines = [_draw(axes, index, points) for index, points in enumerate(curves.values())]
        label_ends(axes, [(line, series.label(curves)) for line, series in zip(lines, curves, strict=True)])
        _mark_training(axes, rows)
        length_axis(axes, sorted({point.filler_tokens for points in curves.values() for point in points}))
        save_figure(figure, path)


def _draw(axes: Any, index: int, points: list[Accuracy]) -> Any:
    """Draw one curve, and return its line."""
    lengths = [point.filler_tokens for point in points]
    errors = [[point.share - point.low for point in points], [point.high - point.share for point in points]]
    drawn = axes.errorbar(
        lengths,
        [point.share for point in points],
        yerr=[[max(0.0, value) for value in side] for side in errors],
        color=GREYS[index % len(GREYS)],
        linestyle=LINES[index % len(LINES)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4.5,
        markerfacecolor="white",
        linewidth=1.3,
        elinewidth=0.6,
        capsize=2,
        clip_on=False,
    )
    return drawn.lines[0]


def _mark_training(axes: Any, rows: list[Row]) -> None:
    """Mark the longest filler of training, if the rows agree on one."""
    trained = {row.get("max_training_filler_tokens") for row in rows if row["task"] == "passkey"} - {None}
    if len(trained) == 1:
        length = trained.pop()
        axes.axvline(length, **GUIDE)
        axes.annotate(
            "longest in training",
            xy=(length, 1.06),
            xytext=(2, 2),
            textcoords="offset points",
            color="#555555",
            fontsize=7,
        )
