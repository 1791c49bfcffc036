"""Passkey accuracy by length: a table for the terminal and a figure for paper."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.reports.rows import Accuracy, Row, Series, accuracy_by_length

FIGURE_SUFFIXES = (".svg", ".png", ".pdf")
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "x")
GREYS = ("#000000", "#595959", "#303030", "#7a7a7a", "#484848", "#666666")
LABEL_GAP = 0.055
"""Least distance of two labels, in accuracy."""


def passkey_table(rows: Iterable[Row]) -> Table | None:
    """Return accuracy by length with Wilson 95 % intervals, one column per system; None without passkey rows."""
    curves = accuracy_by_length(rows)
    if not curves:
        return None
    numbers = sorted({point.num_questions for points in curves.values() for point in points})
    keys = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    table = Table(title="Passkeys recalled, with Wilson 95 % intervals", caption=f"{keys} keys at every length")
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
    rows, path = list(rows), Path(path)
    if path.suffix not in FIGURE_SUFFIXES:
        raise TransformerFamError(
            f"figure {str(path)!r} ends in {path.suffix!r}, required is one of {', '.join(FIGURE_SUFFIXES)}; rename it"
        )
    curves = accuracy_by_length(rows)
    if not curves:
        raise TransformerFamError("there are 0 passkey rows, at least 1 is required; run `fam evaluate passkey` first")
    matplotlib = _matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "transformerfam", "svg.fonttype": "none", "font.size": 9}):
        figure = matplotlib.figure.Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for index, points in enumerate(curves.values()):
            _draw(axes, index, points)
        _label_ends(axes, curves)
        _mark_training(axes, rows)
        lengths = sorted({point.filler_tokens for points in curves.values() for point in points})
        least = min((length for length in lengths if length > 0), default=1)
        axes.set_xscale("symlog", base=2, linthresh=least)
        axes.set_xlim(0 if lengths[0] == 0 else least * 0.9, lengths[-1] * 1.1 + 1)
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_ylim(-0.04, 1.06)
        axes.set_xlabel("filler between key and question (tokens)")
        axes.set_ylabel("keys recalled")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, metadata=metadata)
        except OSError as error:
            raise TransformerFamError(f"could not write {path}: {error.strerror}; choose another file") from error


def _short(num_tokens: float) -> str:
    """Write a length short: 8192 as 8k, 1000000 as 1.0M."""
    if num_tokens >= 1_000_000:
        return f"{num_tokens / 1_000_000:.1f}M"
    return f"{num_tokens / 1024:.3g}k" if num_tokens >= 1024 else f"{num_tokens:g}"


def _draw(axes: Any, index: int, points: list[Accuracy]) -> None:
    lengths = [point.filler_tokens for point in points]
    errors = [[point.share - point.low for point in points], [point.high - point.share for point in points]]
    axes.errorbar(
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


def _label_ends(axes: Any, curves: dict[Series, list[Accuracy]]) -> None:
    """Name every line to the right of its last point, labels moved apart where lines end together."""
    ends = sorted((points[-1].share, series.label(curves)) for series, points in curves.items())
    right = max(points[-1].filler_tokens for points in curves.values())
    heights: list[float] = []
    for share, _ in ends:
        heights.append(share if not heights else max(share, heights[-1] + LABEL_GAP))
    excess = max(0.0, heights[-1] - 1.04) if heights else 0.0
    for (_, label), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            xy=(right, height - excess),
            xytext=(10, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
        )


def _mark_training(axes: Any, rows: list[Row]) -> None:
    """Mark the longest filler of training, if the rows agree on one."""
    trained = {row.get("max_training_filler_tokens") for row in rows if row["task"] == "passkey"} - {None}
    if len(trained) == 1:
        length = trained.pop()
        axes.axvline(length, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            "longest in training",
            xy=(length, 1.06),
            xytext=(2, 2),
            textcoords="offset points",
            color="#555555",
            fontsize=7,
        )


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise MissingPackageError(
            "a figure needs the package matplotlib, which is not installed; install it with: "
            "pip install 'transformerfam[plots]'"
        ) from error
    return matplotlib
