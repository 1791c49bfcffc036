"""A comparison's rows as tables: mean over seeds and their spread; what is missing is shown as missing."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from transformerfam.comparison.plan import Comparison, Kind
from transformerfam.comparison.questions import Questions
from transformerfam.comparison.run import BYTES_LENGTHS, BYTES_TASK, TRAINED_TASK
from transformerfam.reports.rows import ALIKE, Row, mixed_commits, require_alike, was_right

EMPTY = "empty"
LONGEST_NAME = 18
"""Longest part of a system's name on one line, in letters: seven lengths then fit into 80 columns."""


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


def current_rows(comparison: Comparison, rows: Iterable[Row]) -> list[Row]:
    """Return the rows that answer a comparison's questions, and those that describe what answered.

    Raises:
        StateMismatchError: the answers of one run are of different weights or configurations.
    """
    own = [row for row in rows if row["model"] == comparison.name]
    answers = Questions(comparison).answers(own)
    by_run: defaultdict[tuple[str, int], Row] = defaultdict(dict)
    for row in answers:  # all of them are of the comparison's questions, which may differ by length
        weights = {name: value for name, value in row.items() if name != "questions"}
        require_alike(weights, by_run[row["system"], row["seed"]])
    described: dict[tuple[Any, ...], Row] = {}  # of a run that was trained again the last one
    for row in own:
        known = by_run.get((row["system"], row["seed"]), {})
        is_of_answers = all(row[name] == known.get(name, row[name]) for name in ALIKE if name in row)
        if row["task"] in (TRAINED_TASK, BYTES_TASK) and is_of_answers:
            length = row["num_tokens"] if row["task"] == BYTES_TASK else None
            described[row["task"], row["system"], row["seed"], length] = row
    return [*answers, *described.values()]


def cells(
    comparison: Comparison, rows: Iterable[Row], kind: Kind = None, value: Callable[[Row], float] = was_right
) -> dict[str, dict[int, Cell]]:
    """Return every cell, by system and length, empty ones too.

    Args:
        comparison: what was to be done.
        rows: what was done.
        kind: of the questions, one of `comparison.kinds`; the first if not given.
        value: how good the answer of a row is, 0 to 1.

    Raises:
        StateMismatchError: see `current_rows`.
    """
    own, kind = current_rows(comparison, rows), comparison.kinds[0] if kind is None else kind
    answers: dict[tuple[str, int, int], list[float]] = {}
    for row in own:
        if row["task"] == comparison.task and comparison.kind_of(row) == kind:
            key = (row["system"], comparison.length_of(row), row["seed"])
            answers.setdefault(key, []).append(value(row))
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


def over_seeds(comparison: Comparison) -> str:
    """Say over how many seeds numbers are means."""
    num_seeds = len(comparison.seeds)
    return "one seed" if num_seeds == 1 else f"mean over {num_seeds} seeds [least, most]"


def comparison_tables(comparison: Comparison, rows: Sequence[Row]) -> list[Table]:
    """Return what the task shows, then each system's parameters and training, then its speed and bytes.

    Args:
        comparison: what was to be done.
        rows: what was done; rows of other comparisons are left out.

    Raises:
        StateMismatchError: see `current_rows`.
    """
    tables = comparison.tables(rows)
    if commits := mixed_commits(current_rows(comparison, rows)):
        tables[-1].caption = f"{tables[-1].caption}; {commits}"
    return [*tables, *_systems_tables(comparison, rows)]


def _systems_tables(comparison: Comparison, rows: Sequence[Row]) -> list[Table]:
    """Two tables, as both do not fit next to each other on a terminal of 80 columns; what seeds differ in as mean."""
    own = current_rows(comparison, rows)
    trained, carried = defaultdict(list), defaultdict(list)
    for row in own:
        if row["task"] == TRAINED_TASK:
            trained[row["system"]].append(row)
        elif row["task"] == BYTES_TASK:
            carried[row["system"], row["num_tokens"]].append(row)
    training, reading = [], []
    for system in dict.fromkeys(run.system for run in comparison.runs):
        by_seed = trained[system]
        if not by_seed:
            training.append([system, *[EMPTY] * 4])
            reading.append([system, *[EMPTY] * (1 + len(BYTES_LENGTHS))])
            continue
        num_parameters = by_seed[0]["num_parameters"]
        more = f"{num_parameters / trained['fam'][0]['num_parameters'] - 1:+.1%}" if trained["fam"] else "-"
        tokens = "-" if by_seed[0]["num_tokens"] is None else f"{mean(row['num_tokens'] for row in by_seed):,.0f}"
        training.append([system, f"{num_parameters:,}", more, tokens, _mean_on_cpu(by_seed, "cpu_seconds")])
        speed = _mean_on_cpu(carried[system, BYTES_LENGTHS[-1]], "tokens_per_second")
        carries = (carried[system, length][0]["bytes_carried"] for length in BYTES_LENGTHS)
        reading.append([system, speed, *(f"{number:,}" for number in carries)])
    of_seeds = ", mean over seeds" if len(comparison.seeds) > 1 else ""
    bytes_at = [f"bytes at {n:,}" for n in BYTES_LENGTHS]
    return [
        new_table(f"{comparison.name}: training{of_seeds}", ["parameters", "over FAM", "tokens", "CPU s"], training),
        new_table(f"{comparison.name}: reading{of_seeds}", ["tokens/s", *bytes_at], reading),
    ]


def _mean_on_cpu(rows: Iterable[Row], name: str) -> str:
    """Return a mean over the runs on the CPU, "-" where there is none: a GPU's times are others."""
    values = [row[name] for row in rows if row.get("device", "cpu") == "cpu" and row[name] is not None]
    return f"{mean(values):,.0f}" if values else "-"


def new_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Table:
    """Return a table of a column of systems and columns of numbers; no word of either is cut."""
    rows = list(rows)
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("system", no_wrap=True)
    for index, column in enumerate(columns, start=1):
        words = " ".join([column, *(texts[index] for texts in rows)]).split()
        table.add_column(column, justify="right", min_width=max(map(len, words)))
    for name, *texts in rows:
        table.add_row("\n".join(_lines_of_name(name)), *texts)
    return table


def _lines_of_name(name: str) -> list[str]:
    """Part a name that would leave the numbers no room, after an underscore."""
    if len(name) <= LONGEST_NAME or "_" not in name[:LONGEST_NAME]:
        return [name]
    place = name.rindex("_", 0, LONGEST_NAME) + 1
    return [name[:place], *_lines_of_name(name[place:])]
