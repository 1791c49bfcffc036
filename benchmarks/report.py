"""The rows as a page and a figure."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from transformerfam.reports.figure import new_figure, save_figure
from transformerfam.reports.markdown import write_page
from transformerfam.reports.rows import mixed_commits, read_rows


@dataclass(frozen=True)
class Plot:
    """A picture of rows against length, both axes logarithmic.

    Attributes:
        name: part of the file's name.
        measure: the field that is drawn.
        label: of its axis.
        has_slope: whether the exponent of its growth is shown.
    """

    name: str
    measure: str
    label: str
    has_slope: bool = False


MEMORY = Plot("memory", "bytes_peak", "peak memory above what stood there before, bytes")
SPEED = Plot("speed", "tokens_per_second_median", "tokens per second")
PLOTS = {
    "prefill": (Plot("time", "seconds_median", "seconds", has_slope=True), MEMORY),
    "decode": (SPEED,),
    "training": (SPEED, MEMORY),
}


def last_of_each_cell(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, of cells that were measured more than once the last."""
    names: tuple[str, ...] = ("figure", "model", "system", "num_tokens", "block_size", "num_memory_segments", "machine")
    names += ("threads", "fam_update", "frozen_dtype", "tokens_read", "streams", "memories")
    return list({tuple(row.get(name) for name in names): row for row in rows}.values())


def slope(lengths: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the exponent of time against length: the slope of a line through their logarithms."""
    x, y = [math.log(n) for n in lengths], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def write_report(path: Path) -> Iterator[Path]:
    """Write `NAME.md`, and for every plot and model `NAME_FIGURE_PLOT_MODEL.svg`, next to the rows; yield the paths."""
    rows = last_of_each_cell(read_rows([path]))
    text = [f"# Benchmarks\n\nRows: `{path.name}`. Medians, with the smallest and largest of all runs in brackets.\n"]
    for machine in dict.fromkeys((row["machine"], row["threads"], row["torch"], row["transformers"]) for row in rows):
        name, threads, torch_version, transformers_version = machine
        text.append(f"- {name}, {threads} threads, torch {torch_version}, transformers {transformers_version}")
    if commits := mixed_commits(rows):
        text.append(f"- {commits}")
    figures = {
        figure: [row for row in rows if row["figure"] == figure] for figure in dict.fromkeys(r["figure"] for r in rows)
    }
    for figure, of_figure in figures.items():
        text.append(f"\n## {figure}\n")
        text += _table(of_figure)
        for plot in PLOTS.get(figure, ()):
            for model in dict.fromkeys(row["model"] for row in of_figure):
                picture = path.with_name(f"{path.stem}_{figure}_{plot.name}_{model}.svg")
                text += _plot([row for row in of_figure if row["model"] == model], plot, picture)
                yield picture
    page = path.with_suffix(".md")
    write_page("\n".join(text) + "\n", page, "benchmarks")
    yield page


def _table(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    hidden = (
        "task",
        "figure",
        "schema",
        "version",
        "git_commit",
        "machine",
        "threads",
        "torch",
        "transformers",
        "cpu_capability",
    )
    names = [n for n in dict.fromkeys(name for row in rows for name in row) if n not in hidden]
    columns = list(dict.fromkeys(n.removesuffix("_median").removesuffix("_min").removesuffix("_max") for n in names))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row, name) for name in columns) + " |" for row in rows]


def _cell(row: Row, name: str) -> str:
    if f"{name}_median" in row:
        low, high = row[f"{name}_min"], row[f"{name}_max"]
        return f"{_number(row[f'{name}_median'])} ({_number(low)} to {_number(high)})"
    return _number(row[name]) if name in row else ""


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plot(rows: Sequence[Row], plot: Plot, path: Path) -> list[str]:
    """Draw one measure against length, a labelled line per system, and return its lines on the page."""
    lines = ["", f"![{plot.label} against length]({path.name})", ""]
    markers = itertools.cycle("osv^Dx+*")
    with new_figure(path, (7, 4.5)) as (figure, (axes,)):
        for system in dict.fromkeys(row["system"] for row in rows):
            of_system = [row for row in rows if row["system"] == system and plot.measure in row]
            own = sorted((row["num_tokens"], row[plot.measure]) for row in of_system)
            if not own:
                continue
            lengths, values = zip(*own, strict=True)
            label = system
            if plot.has_slope and len(own) > 1:
                exponent = slope(lengths, values)
                label = f"{system}, slope {exponent:.2f}"
                reach = f"{lengths[0]:,} to {lengths[-1]:,} tokens"
                lines.append(f"- {system}: grows with length to the power {exponent:.2f} ({reach})")
            axes.plot(lengths, values, marker=next(markers), label=label)
        title = f"{rows[0]['figure']}, {rows[0]['model']}"
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=plot.label, title=title)
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend()
        save_figure(figure, path)
    return lines
