"""A comparison's rows as a figure, black on white, and what the tasks draw it with: shares by length, and ablations."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformerfam.comparison.plan import Comparison
from transformerfam.comparison.report import EMPTY, Cell, current_rows
from transformerfam.errors import TransformerFamError
from transformerfam.reports.figure import (
    GUIDE,
    LINES,
    MARKERS,
    label_ends,
    new_figure,
    save_figure,
    short_length,
)
from transformerfam.reports.rows import Row

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("windows", ("bswa", "attention_sinks", "transformer_xl", "full")),
    ("recurrent memories", ("rmt", "armt", "autocompressor", "feedback_segment", "block_recurrent")),
    ("linear memories", ("infini", "gated_linear")),
    ("FAM and its controls", ("fam", "static_summary")),
)
"""Panels of the figure: a title, and how the names of its systems begin. FAM is drawn in each."""

MAX_COLUMNS = 44
"""Letters of a line that names what is missing."""
MAX_LINES = 4
"""Variants that are drawn as lines; more of them are drawn as a matrix."""


def panel_of(system: str) -> str:
    """Return the panel of a system: that whose name begins most like it."""
    found = [(len(start), title) for title, starts in PANELS for start in starts if system.startswith(start)]
    return max(found, default=(0, PANELS[-1][0]))[1]


def plot_comparison(comparison: Comparison, rows: Sequence[Row], path: str | Path) -> None:
    """Draw what a comparison's task shows, black on white, each line named at its end.

    Bars go from the worst seed to the best. What is missing is named as empty.

    Args:
        comparison: what was to be done.
        rows: what was done.
        path: file to write; its suffix says how: .svg, .png or .pdf.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: there is not one cell, or the suffix is another.
    """
    if not any(row["task"] == comparison.task for row in current_rows(comparison, rows)):
        raise TransformerFamError(f"there are no rows of {comparison.name}; run `fam compare` first")
    comparison.plot(rows, path)


def draw_shares(
    panels: Mapping[str, Mapping[str, Mapping[int, Cell]]], finish: Callable[[Any], None], path: str | Path
) -> None:
    """Draw shares by length, one panel per title, and let `finish` name the axes of each."""
    num_rows, num_columns = -(-len(panels) // 2), min(2, len(panels))
    with new_figure(path, (4.8 * num_columns, 2.9 * num_rows), num_rows, num_columns) as (figure, all_axes):
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, by_system) in zip(all_axes, panels.items(), strict=False):
            _draw_panel(axes, title, by_system)
            finish(axes)
        save_figure(figure, path)


def by_panel(found: Mapping[str, Mapping[int, Cell]]) -> dict[str, Mapping[str, Mapping[int, Cell]]]:
    """Part systems into panels, with FAM in each."""
    panels: dict[str, Mapping[str, Mapping[int, Cell]]] = {}
    for title, _ in PANELS:
        systems = [system for system in found if panel_of(system) == title]
        if systems:
            drawn = systems if "fam" in systems or "fam" not in found else ["fam", *systems]
            panels[title] = {system: found[system] for system in drawn}
    return panels


def _draw_panel(axes: Any, title: str, systems: Mapping[str, Mapping[int, Cell]]) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    lines: list[tuple[Any, str]] = []
    missing = []
    for number, (system, by_length) in enumerate(systems.items()):
        points = [(length, cell) for length, cell in by_length.items() if cell.by_seed]
        if not points:
            missing.append(system)
            continue
        shares = [cell.mean for _, cell in points]
        errors = [
            [cell.mean - min(cell.by_seed.values()) for _, cell in points],
            [max(cell.by_seed.values()) - cell.mean for _, cell in points],
        ]
        drawn = axes.errorbar(
            [length for length, _ in points],
            shares,
            yerr=errors,
            **line_style(system, number),
            elinewidth=0.6,
            capsize=2,
            clip_on=False,
        )
        label = system if len(points) == len(by_length) else f"{system} ({len(by_length) - len(points)} {EMPTY})"
        lines.append((drawn.lines[0], label))
    label_ends(axes, lines)
    name_missing(axes, missing, 0.08, "bottom")


def line_style(system: str, number: int) -> dict[str, Any]:
    """Return how the line of a system is drawn that has this number in its panel; no two of thirty are alike."""
    is_fam = system == "fam"
    return {
        "color": "#000000" if is_fam else "#4a4a4a",
        "linestyle": "-" if is_fam else LINES[1 + number % (len(LINES) - 1)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "markerfacecolor": "#000000" if is_fam else "white",
        "linewidth": 2.0 if is_fam else 1.1,
    }


def mark_chance(axes: Any, chance: float) -> None:
    """Draw what guessing gives."""
    axes.axhline(chance, **GUIDE)
    axes.text(0.01, chance, "chance", transform=axes.get_yaxis_transform(), fontsize=7, color="#555555", va="bottom")


def name_missing(axes: Any, missing: Sequence[str], height: float, alignment: str) -> None:
    """Write which systems have no cell, where there are such."""
    if missing:
        names = textwrap.fill(f"{EMPTY}: {', '.join(missing)}", MAX_COLUMNS)
        axes.text(0.02, height, names, transform=axes.transAxes, fontsize=7, style="italic", va=alignment)


def plot_matrix(lengths: Sequence[int], found: Mapping[str, Mapping[int, Cell]], path: str | Path) -> None:
    """Draw one row per system and one column per length, dark where keys are recalled, with the number in each cell."""
    with new_figure(path, (2.4 + 0.75 * len(lengths), 0.9 + 0.24 * len(found))) as (figure, (axes,)):
        for row, by_length in enumerate(found.values()):
            for column, length in enumerate(lengths):
                cell = by_length.get(length)
                if cell is None:
                    continue
                share = cell.mean if cell.by_seed else 0.0
                axes.fill_between([column, column + 1], row, row + 1, color=str(1 - 0.75 * share), linewidth=0)
                text = f"{share:.2f}" if cell.by_seed else EMPTY
                color = "white" if share > 0.6 else "black"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_xlim(0, len(lengths))
        axes.set_ylim(len(found), 0)
        axes.set_xticks([column + 0.5 for column in range(len(lengths))], [short_length(length) for length in lengths])
        axes.set_yticks([row + 0.5 for row in range(len(found))], list(found))
        axes.set_xlabel("filler between key and question (tokens); cells: keys recalled")
        axes.tick_params(length=0)
        save_figure(figure, path)
