"""A comparison's rows as tables and a figure: mean over seeds and their spread; what is missing is shown as missing."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.table import Table

from transformerfam.comparison.plan import BASE, Comparison
from transformerfam.comparison.run import BYTES_LENGTHS, BYTES_TASK, TRAINED_TASK
from transformerfam.errors import TransformerFamError
from transformerfam.reports.figure import LINES, MARKERS, label_ends, length_axis, new_figure, save_figure
from transformerfam.reports.rows import Row

EMPTY = "empty"
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("windows", ("bswa", "attention_sinks", "transformer_xl", "full")),
    ("recurrent memories", ("rmt", "armt", "autocompressor", "feedback_segment", "block_recurrent")),
    ("linear memories", ("infini", "gated_linear")),
    ("FAM and its controls", ("fam", "static_summary")),
)
"""Panels of the figure: a title, and how the names of its systems begin. FAM is drawn in each."""


class Cell(NamedTuple):
    """Accuracy of one system at one length.

    Attributes:
        by_seed: share of right keys, by seed.
        num_missing: runs that have no answers here.
    """

    by_seed: Mapping[int, float]
    num_missing: int

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.by_seed.values())

    def __str__(self) -> str:
        if not self.by_seed:
            return EMPTY
        low, high = min(self.by_seed.values()), max(self.by_seed.values())
        spread = f" [{low:.2f}, {high:.2f}]" if len(self.by_seed) > 1 else ""
        return f"{self.mean:.2f}{spread}" + (f", {self.num_missing} {EMPTY}" if self.num_missing else "")


def require_one_version(rows: Iterable[Row]) -> None:
    """Refuse rows that different versions of the package wrote.

    Raises:
        TransformerFamError: with the versions.
    """
    versions = sorted({str(row.get("version")) for row in rows})
    if len(versions) > 1:
        raise TransformerFamError(
            f"the rows come from versions {', '.join(versions)}, required is one; report each version's rows by "
            "themselves"
        )


def cells(comparison: Comparison, rows: Iterable[Row], num_supports: int | None = None) -> dict[str, dict[int, Cell]]:
    """Return every cell, by system and length, empty ones too.

    Args:
        comparison: what was to be done.
        rows: what was done.
        num_supports: of facts, questions with so many supports alone.

    Raises:
        TransformerFamError: the rows come from different versions of the package.
    """
    own = [row for row in rows if row["model"] == comparison.name]
    require_one_version(own)
    answers: dict[tuple[str, int, int], list[bool]] = {}
    for row in own:
        if row["task"] == comparison.task and row.get("num_supports") == num_supports:
            key = (row["system"], row["filler_tokens"], row["seed"])
            answers.setdefault(key, []).append(bool(row["correct"]))
    found: dict[str, dict[int, Cell]] = {}
    for system in comparison.systems:
        for length in comparison.lengths_of(system):
            shares = {
                seed: mean(answers[system, length, seed])
                for seed in comparison.seeds
                if (system, length, seed) in answers
            }
            found.setdefault(system, {})[length] = Cell(shares, len(comparison.seeds) - len(shares))
    return found


class Capacity(NamedTuple):
    """How many of several keys come back.

    Attributes:
        recalled: keys of a text that were right, mean over texts, by seed.
        outdated: share of the names told anew that were answered with an old key; None where none was.
    """

    recalled: Mapping[int, float]
    outdated: float | None

    def __str__(self) -> str:
        if not self.recalled:
            return EMPTY
        text = f"{mean(self.recalled.values()):.2f}"
        if len(self.recalled) > 1:
            text += f" [{min(self.recalled.values()):.2f}, {max(self.recalled.values()):.2f}]"
        return text if self.outdated is None else f"{text}, old {self.outdated:.2f}"


def capacities(comparison: Comparison, rows: Iterable[Row]) -> dict[str, dict[tuple[int, int], Capacity]]:
    """Return how many keys come back, by system, filler and number of keys told.

    Raises:
        TransformerFamError: the rows come from different versions of the package.
    """
    own = [row for row in rows if row["model"] == comparison.name]
    require_one_version(own)
    found: dict[str, dict[tuple[int, int], Capacity]] = {}
    for system in comparison.systems:
        for length in comparison.lengths_of(system):
            for num_told in comparison.num_told:
                asked = [
                    row
                    for row in own
                    if row["task"] == comparison.task
                    and (row["system"], row["filler_tokens"], row["num_told"]) == (system, length, num_told)
                ]
                seeds = sorted({row["seed"] for row in asked})
                recalled = {s: num_told * mean(bool(r["correct"]) for r in asked if r["seed"] == s) for s in seeds}
                retold = [bool(row["is_outdated"]) for row in asked if row["is_retold"]]
                outdated = mean(retold) if retold else None
                found.setdefault(system, {})[length, num_told] = Capacity(recalled, outdated)
    return found


def _capacity_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    table = Table(
        title=f"{comparison.name}: keys recalled of those told, mean over {len(comparison.seeds)} seeds [least, most]",
        caption=f"{comparison.num_keys} texts per seed, length and number of keys"
        + (
            f"; {comparison.num_retold} names told anew, old: answered with the old key"
            if comparison.num_retold
            else ""
        ),
    )
    table.add_column("system")
    table.add_column("filler tokens", justify="right")
    for num_told in comparison.num_told:
        table.add_column(f"{num_told} told", justify="right")
    for system, found in capacities(comparison, rows).items():
        for length in comparison.lengths_of(system):
            table.add_row(system, f"{length:,}", *(str(found[length, n]) for n in comparison.num_told))
    return table


def _plot_capacity(comparison: Comparison, rows: Sequence[Row], path: str | Path) -> None:
    """Draw keys recalled against keys told, one panel per length."""
    found = capacities(comparison, rows)
    lengths = list(comparison.filler_tokens)
    num_rows, num_columns = -(-len(lengths) // 2), min(2, len(lengths))
    with new_figure(path, (5.2 * num_columns, 3.4 * num_rows), num_rows, num_columns) as (figure, all_axes):
        for axes in all_axes[len(lengths) :]:
            axes.set_visible(False)
        for axes, length in zip(all_axes, lengths, strict=False):
            axes.plot(comparison.num_told, comparison.num_told, color="#bbbbbb", linewidth=0.8)
            top = max(comparison.num_told)
            ends, missing = [], []
            for number, system in enumerate(found):
                own = [(n, found[system].get((length, n))) for n in comparison.num_told]
                points = [(n, cell) for n, cell in own if cell is not None and cell.recalled]
                if not points:
                    missing.append(system)
                    continue
                values = [mean(cell.recalled.values()) for _, cell in points]
                axes.plot(
                    [n for n, _ in points],
                    values,
                    color="#000000",
                    linestyle=LINES[number % len(LINES)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    markerfacecolor="white",
                    linewidth=1.1,
                )
                ends.append((points[-1][0], values[-1], system))
            axes.set_ylim(-0.04 * top, 1.06 * top)
            axes.set_xticks(comparison.num_told)
            axes.set_xlabel("keys told")
            axes.set_ylabel("keys recalled")
            axes.set_title(f"{length:,} tokens of filler", loc="left", fontsize=9)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            label_ends(axes, ends, (0.0, top))
            if missing:
                axes.text(0.02, 0.9, f"{EMPTY}: {', '.join(missing)}", transform=axes.transAxes, fontsize=7)
        save_figure(figure, path)


def comparison_tables(comparison: Comparison, rows: Sequence[Row]) -> list[Table]:
    """Return accuracy by system and length, and what each system is: parameters, training, bytes, speed.

    Args:
        comparison: what was to be done.
        rows: what was done; rows of other comparisons are left out.

    Raises:
        TransformerFamError: the rows come from different versions of the package.
    """
    if comparison.task == "named-keys":
        return [_capacity_table(comparison, rows), _systems_table(comparison, rows)]
    if comparison.task == "facts":
        by_supports = [_accuracy_table(comparison, rows, number) for number in comparison.num_supports]
        return [*by_supports, _systems_table(comparison, rows)]
    return [_accuracy_table(comparison, rows), _systems_table(comparison, rows)]


def _accuracy_table(comparison: Comparison, rows: Sequence[Row], num_supports: int | None = None) -> Table:
    what = "passkeys recalled" if num_supports is None else f"questions with {num_supports} supports answered"
    table = Table(
        title=f"{comparison.name}: {what}, mean over {len(comparison.seeds)} seeds [least, most]",
        caption=f"{comparison.num_keys} questions per seed and length; lengths in tokens of filler",
    )
    table.add_column("system")
    for length in comparison.filler_tokens:
        table.add_column(f"{length:,}", justify="right")
    for system, by_length in cells(comparison, rows, num_supports).items():
        table.add_row(system, *(str(by_length.get(length, "-")) for length in comparison.filler_tokens))
    return table


def _systems_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    own = [row for row in rows if row["model"] == comparison.name]
    trained = {row["system"]: row for row in own if row["task"] == TRAINED_TASK}
    carried = {(r["system"], r["num_tokens"]): r for r in own if r["task"] == BYTES_TASK}
    table = Table(title=f"{comparison.name}: the systems")
    columns = ("system", "parameters", "beside FAM", "trained on tokens", "CPU s", "read tokens/s")
    for number, title in enumerate((*columns, *(f"bytes at {n:,}" for n in BYTES_LENGTHS))):
        table.add_column(title, justify="right" if number else "left")
    fam = trained.get("fam")
    for system in dict.fromkeys(run.system for run in comparison.runs if run.system != BASE):
        row = trained.get(system)
        if row is None:
            table.add_row(system, *[EMPTY] * (len(columns) - 1 + len(BYTES_LENGTHS)))
            continue
        beside = "-" if fam is None else f"{row['num_parameters'] / fam['num_parameters'] - 1:+.1%}"
        numbers = [row["num_parameters"], row["num_tokens"], row["cpu_seconds"]]
        numbers += [carried[system, BYTES_LENGTHS[-1]]["tokens_per_second"]]
        numbers += [carried[system, n]["bytes_carried"] for n in BYTES_LENGTHS]
        shown = ["-" if number is None else f"{number:,.0f}" for number in numbers]
        table.add_row(system, shown[0], beside, *shown[1:])
    return table


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
        TransformerFamError: there is not one cell, the suffix is another, or rows of several versions are mixed.
    """
    if not any(row["model"] == comparison.name and row["task"] == comparison.task for row in rows):
        raise TransformerFamError(f"there are no rows of {comparison.name}; run `fam compare` first")
    if comparison.task == "named-keys":
        _plot_capacity(comparison, rows, path)
        return
    panels: dict[str, dict[str, dict[int, Cell]]] = {}
    if comparison.task == "facts":
        for number in comparison.num_supports:
            panels[f"{number} supports"] = cells(comparison, rows, number)
    else:
        found = cells(comparison, rows)
        for title, _ in PANELS:
            systems = [system for system in found if panel_of(system) == title]
            if systems:
                drawn = systems if "fam" in systems or "fam" not in found else ["fam", *systems]
                panels[title] = {system: found[system] for system in drawn}
    num_rows, num_columns = -(-len(panels) // 2), min(2, len(panels))
    with new_figure(path, (4.8 * num_columns, 2.9 * num_rows), num_rows, num_columns) as (figure, all_axes):
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, by_system) in zip(all_axes, panels.items(), strict=False):
            _draw_panel(axes, title, by_system)
            length_axis(axes, list(comparison.filler_tokens))
        save_figure(figure, path)


def _draw_panel(axes: Any, title: str, systems: Mapping[str, Mapping[int, Cell]]) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    ends: list[tuple[float, float, str]] = []
    missing = []
    for number, (system, by_length) in enumerate(systems.items()):
        points = [(length, cell) for length, cell in by_length.items() if cell.by_seed]
        if not points:
            missing.append(system)
            continue
        is_fam = system == "fam"
        shares = [cell.mean for _, cell in points]
        errors = [
            [cell.mean - min(cell.by_seed.values()) for _, cell in points],
            [max(cell.by_seed.values()) - cell.mean for _, cell in points],
        ]
        axes.errorbar(
            [length for length, _ in points],
            shares,
            yerr=errors,
            color="#000000" if is_fam else "#4a4a4a",
            linestyle="-" if is_fam else LINES[1 + number % (len(LINES) - 1)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markerfacecolor="#000000" if is_fam else "white",
            linewidth=2.0 if is_fam else 1.1,
            elinewidth=0.6,
            capsize=2,
            clip_on=False,
        )
        label = system if len(points) == len(by_length) else f"{system} ({len(by_length) - len(points)} {EMPTY})"
        ends.append((points[-1][0], shares[-1], label))
    label_ends(axes, ends)
    if missing:
        axes.text(0.02, 0.04, f"{EMPTY}: {', '.join(missing)}", transform=axes.transAxes, fontsize=7, style="italic")
