"""A comparison's rows as a figure, black on white: accuracy by length, keys recalled of those told, ablations."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformerfam.comparison.plan import Comparison, RunName
from transformerfam.comparison.report import EMPTY, Capacity, Cell, capacities, cells, current_rows, kinds
from transformerfam.errors import TransformerFamError
from transformerfam.reports.figure import (
    GUIDE,
    LINES,
    MARKERS,
    label_ends,
    length_axis,
    new_figure,
    save_figure,
    short_length,
)
from transformerfam.reports.rows import Row
from transformerfam.tasks.facts import PLACES
from transformerfam.tasks.named_keys_evaluation import KEY_BITS

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

UNMEASURED = Capacity({}, None, None)
"""Stands where a system was not to be asked."""


def panel_of(system: str) -> str:
    """Return the panel of a system: that whose name begins most like it."""
    found = [(len(start), title) for title, starts in PANELS for start in starts if system.startswith(start)]
    return max(found, default=(0, PANELS[-1][0]))[1]


def plot_comparison(comparison: Comparison, rows: Sequence[Row], path: str | Path) -> None:
    """Draw accuracy by length, one panel per kind of system, black on white, each line named at its end.

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
    if comparison.task == "named-keys":
        _plot_capacity(comparison, rows, path)
        return
    parts = {what: cells(comparison, rows, kind) for kind, what in kinds(comparison).items()}
    panels: Mapping[str, Mapping[str, Mapping[int, Cell]]] = parts
    if comparison.task == "passkey" and len(parts) == 1:
        (found,) = parts.values()
        if len(comparison.variants) > MAX_LINES:
            _plot_matrix(comparison, found, path)
            return
        panels = _by_panel(found)
    num_rows, num_columns = -(-len(panels) // 2), min(2, len(panels))
    with new_figure(path, (4.8 * num_columns, 2.9 * num_rows), num_rows, num_columns) as (figure, all_axes):
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, by_system) in zip(all_axes, panels.items(), strict=False):
            _draw_panel(axes, title, by_system)
            if comparison.task == "facts":
                _mark_chance(axes)
                length_axis(
                    axes, comparison.filler_tokens, "novel that the story is hidden in (tokens)", "answers right"
                )
            else:
                length_axis(axes, comparison.filler_tokens)
        save_figure(figure, path)


def _by_panel(found: Mapping[str, Mapping[int, Cell]]) -> dict[str, Mapping[str, Mapping[int, Cell]]]:
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
    _name_missing(axes, missing, 0.08, "bottom")


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


def _mark_chance(axes: Any) -> None:
    chance = 1 / len(PLACES)
    axes.axhline(chance, **GUIDE)
    axes.text(0.01, chance, "chance", transform=axes.get_yaxis_transform(), fontsize=7, color="#555555", va="bottom")


def _plot_capacity(comparison: Comparison, rows: Sequence[Row], path: str | Path) -> None:
    """Draw keys recalled, and beside them bits held, against keys told: one row of panels per length and group.

    With several FAMs the last row has the most that each holds at the shortest length, against its rows, one line per
    width.
    """
    found = capacities(comparison, rows)
    fams = [system for system in found if system == "fam" or comparison.variants.get(system) == "fam"]
    others = [system for system in found if system not in fams]
    groups = [fams, ["fam", *others] if "fam" in fams else others] if fams and others else [list(found)]
    panels = [(length, group) for length in comparison.filler_tokens for group in groups]
    num_rows = len(panels) + (len(fams) > 1)
    with new_figure(path, (9.6, 2.8 * num_rows), num_rows, 2) as (figure, all_axes):
        for number, (length, group) in enumerate(panels):
            own = {s: [found[s].get((length, n), UNMEASURED) for n in comparison.num_told] for s in group}
            keys = {system: [cell.keys for cell in cells] for system, cells in own.items()}
            bits = {system: [cell.bits for cell in cells] for system, cells in own.items()}
            axes = all_axes[2 * number : 2 * number + 2]
            axes[0].set_title(f"{length:,} tokens of filler", loc="left", fontsize=9)
            _name_missing(axes[0], [s for s, values in keys.items() if set(values) == {None}], 0.98, "top")
            for drawn, values, per_key in zip(axes, (keys, bits), (1.0, KEY_BITS), strict=True):
                drawn.plot(comparison.num_told, [n * per_key for n in comparison.num_told], color="#bbbbbb", lw=0.8)
                _draw_capacity(drawn, comparison.num_told, values, max(comparison.num_told) * per_key)
                drawn.set_xlabel("keys told")
            _name_capacity(axes, "")
        if len(fams) > 1:
            _draw_fams(all_axes[-2:], comparison, {system: found[system] for system in fams})
        save_figure(figure, path)


def _draw_fams(
    axes: Sequence[Any], comparison: Comparison, fams: Mapping[str, Mapping[tuple[int, int], Capacity]]
) -> None:
    """Draw the most that each FAM holds at the shortest length against its rows, one line per width."""
    length = min(comparison.filler_tokens)
    recipes = {system: comparison.recipe_of(RunName(system, comparison.seeds[0])) for system in fams}
    sizes = sorted({recipe.fam.fam_length for recipe in recipes.values()})
    most: list[dict[str, list[float | None]]] = [{}, {}]
    for system, recipe in recipes.items():
        column = sizes.index(recipe.fam.fam_length)
        cells = [fams[system].get((length, n), UNMEASURED) for n in comparison.num_told]
        for lines, values in zip(most, ([c.keys for c in cells], [c.bits for c in cells]), strict=True):
            line = lines.setdefault(f"width {recipe.model.hidden_size}", [None] * len(sizes))
            line[column] = max((value for value in values if value is not None), default=None)
    axes[0].set_title(f"the most, {length:,} tokens of filler", loc="left", fontsize=9)
    for drawn, lines in zip(axes, most, strict=True):
        heights = [value for line in lines.values() for value in line if value is not None]
        _draw_capacity(drawn, sizes, lines, max([1.0, *heights]))
        drawn.set_xlabel("rows of FAM")
    _name_capacity(axes, ", the most")


def _name_capacity(axes: Sequence[Any], more: str) -> None:
    axes[0].set_ylabel(f"keys recalled{more}")
    axes[1].set_ylabel(f"bits held, at least{more}")


def _draw_capacity(axes: Any, places: Sequence[int], lines: Mapping[str, Sequence[float | None]], top: float) -> None:
    """Draw one line per name over places in powers of two, those without a value left out."""
    named = []
    for number, (name, values) in enumerate(lines.items()):
        points = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        if not points:
            continue
        (line,) = axes.plot([place for place, _ in points], [value for _, value in points], **line_style(name, number))
        named.append((line, name))
    axes.set_ylim(-0.04 * top, 1.06 * top)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    label_ends(axes, named, (0.0, top))


def _name_missing(axes: Any, missing: Sequence[str], height: float, alignment: str) -> None:
    """Write which systems have no cell, where there are such."""
    if missing:
        names = textwrap.fill(f"{EMPTY}: {', '.join(missing)}", MAX_COLUMNS)
        axes.text(0.02, height, names, transform=axes.transAxes, fontsize=7, style="italic", va=alignment)


def _plot_matrix(comparison: Comparison, found: Mapping[str, Mapping[int, Cell]], path: str | Path) -> None:
    """Draw one row per system and one column per length, dark where keys are recalled, with the number in each cell."""
    lengths = list(comparison.filler_tokens)
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
