"""Named keys compared: how many of several keys come back."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal, NamedTuple

from rich.table import Table

from transformerfam.comparison.figures import line_style, name_missing
from transformerfam.comparison.names import RunName
from transformerfam.comparison.plan import Asked
from transformerfam.comparison.report import EMPTY, current_rows, new_table, over_seeds
from transformerfam.comparison.texts import TextsComparison
from transformerfam.reports.figure import label_ends, new_figure, save_figure
from transformerfam.reports.rows import Row, was_right
from transformerfam.tasks.named_keys_evaluation import KEY_BITS, NamedKeysEvaluation
from transformerfam.tasks.ranges import Integer, Integers, Pair


class NamedKeysComparison(TextsComparison):
    """A comparison by how many of several keys come back."""

    parted_by: ClassVar[tuple[str, ...]] = ("num_told",)
    also_trained_by: ClassVar[tuple[str, ...]] = ("worded-keys",)

    task: Literal["named-keys"] = "named-keys"
    """What is asked."""

    num_told: Integers = (1,)
    """How many keys a text gives; every number has different texts."""

    num_retold: Integer = 0
    """Names that are given a second key, which counts."""

    keys_apart: Pair = (0, 0)
    """Least and most tokens of filler between two keys."""

    @property
    def kinds(self) -> tuple[int, ...]:
        """Numbers of keys."""
        return self.num_told

    @property
    def num_questions(self) -> int:
        """Questions that a run is asked at every length: one for each key of each text."""
        return self.num_keys * sum(self.num_told)

    def kind_of(self, row: Row) -> int | None:
        """Return how many keys a row's text gives."""
        return row.get("num_told")

    def question_of(self, row: Row) -> tuple[int | None, ...]:
        """Return the number of a row's text, and of the key in it."""
        return row.get("text"), row.get("order")

    def evaluation(self, seed: int, **options: Any) -> NamedKeysEvaluation:
        """Return what asks the questions of a seed; see `Comparison.evaluation`."""
        own = {"num_told": self.num_told, "num_retold": self.num_retold, "apart": self.keys_apart}
        return NamedKeysEvaluation(**self.common_options(seed) | own | options)

    def asked(self, kind: int, seed: int, length: int, block_size: int) -> Asked:
        """Return the keys of all texts with that many; see `Comparison.asked`."""
        return {
            (number, order): {"key": key, "is_retold": name in keys.outdated}
            for number, keys in enumerate(self.evaluation(seed).texts(kind))
            for order, (name, key) in enumerate(keys.newest.items())
        }

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Return keys recalled and bits held, by how many were given."""
        return [_capacity_table(self, rows)]

    def plot(self, rows: Sequence[Row], path: str | Path) -> None:
        """Draw keys recalled and bits held against keys given; see `Comparison.plot`."""
        _plot_capacity(self, rows, path)


class Capacity(NamedTuple):
    """How many of several keys come back.

    Attributes:
        recalled: keys of a text that were right, mean over texts, by seed.
        bits: what the model knows of all keys of a text, mean over texts and seeds, a lower bound of what is held; None
            where nothing was measured.
        outdated: share of the names with a second key for which the model gave the first; None without such names.
    """

    recalled: Mapping[int, float]
    bits: float | None
    outdated: float | None

    @property
    def keys(self) -> float | None:
        """Keys recalled, mean over seeds; None where nothing was measured."""
        return mean(self.recalled.values()) if self.recalled else None

    def __str__(self) -> str:
        if self.keys is None:
            return EMPTY
        text = f"{self.keys:.2f}"
        if len(self.recalled) > 1:
            text += f" [{min(self.recalled.values()):.2f}, {max(self.recalled.values()):.2f}]"
        text += "" if self.bits is None else f", {self.bits:.0f} bits"
        return text if self.outdated is None else f"{text}, old {self.outdated:.2f}"


def capacities(comparison: NamedKeysComparison, rows: Iterable[Row]) -> dict[str, dict[tuple[int, int], Capacity]]:
    """Return how many keys come back, by system, filler and number of keys given.

    Raises:
        StateMismatchError: see `current_rows`.
    """
    own = current_rows(comparison, rows)
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
                recalled = {s: num_told * mean(was_right(r) for r in asked if r["seed"] == s) for s in seeds}
                retold = [bool(row["is_outdated"]) for row in asked if row["is_retold"]]
                outdated = mean(retold) if retold else None
                bits = num_told * mean(row["bits"] for row in asked) if asked else None
                found.setdefault(system, {})[length, num_told] = Capacity(recalled, bits, outdated)
    return found


UNMEASURED = Capacity({}, None, None)
"""Stands where a system was not to be asked."""


def _capacity_table(comparison: NamedKeysComparison, rows: Sequence[Row]) -> Table:
    caption = f"{comparison.num_keys} texts per seed, length and number of keys; bits: held at least, of "
    caption += f"{KEY_BITS:.1f} for each key"
    if comparison.num_retold:
        caption += f"; {comparison.num_retold} names given a second key, old: answered with the old key"
    return new_table(
        f"{comparison.name}: keys recalled of those given, {over_seeds(comparison)}",
        ["filler tokens", *(f"{num_told} given" for num_told in comparison.num_told)],
        (
            [system, f"{length:,}", *(str(found[length, n]) for n in comparison.num_told)]
            for system, found in capacities(comparison, rows).items()
            for length in comparison.lengths_of(system)
        ),
        caption,
    )


def _plot_capacity(comparison: NamedKeysComparison, rows: Sequence[Row], path: str | Path) -> None:
    """Draw keys recalled and, next to them, bits held against keys given: one row of panels per length and group.

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
            name_missing(axes[0], [s for s, values in keys.items() if set(values) == {None}], 0.98, "top")
            for drawn, values, per_key in zip(axes, (keys, bits), (1.0, KEY_BITS), strict=True):
                drawn.plot(comparison.num_told, [n * per_key for n in comparison.num_told], color="#bbbbbb", lw=0.8)
                _draw_capacity(drawn, comparison.num_told, values, max(comparison.num_told) * per_key)
                drawn.set_xlabel("keys given")
            _name_capacity(axes, "")
        if len(fams) > 1:
            _draw_fams(all_axes[-2:], comparison, {system: found[system] for system in fams})
        save_figure(figure, path)


def _draw_fams(
    axes: Sequence[Any], comparison: NamedKeysComparison, fams: Mapping[str, Mapping[tuple[int, int], Capacity]]
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
