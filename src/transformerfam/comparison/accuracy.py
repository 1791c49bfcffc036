"""Tasks whose answers are right or wrong, and are shown as shares by length, one table and one panel for each kind."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from transformerfam.comparison.figures import draw_shares
from transformerfam.comparison.filler import DrawnComparison
from transformerfam.comparison.plan import Kind
from transformerfam.comparison.report import Cell, cells, new_table, over_seeds
from transformerfam.reports.figure import length_axis
from transformerfam.reports.rows import Row


class AccuracyComparison(DrawnComparison):
    """A comparison by the share of right answers."""

    def title_of(self, kind: Kind) -> str:
        """Return what is right of the questions of a kind, for a table and a panel."""
        return f"{self.task}, {kind}" if len(self.kinds) > 1 else self.task

    def finish_panel(self, axes: Any) -> None:
        """Name the axes of a panel, and draw what belongs to the task."""
        length_axis(axes, self.filler_tokens)

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Return one table for each kind of question."""
        return [accuracy_table(self, rows, kind, self.title_of(kind)) for kind in self.kinds]

    def plot(self, rows: Sequence[Row], path: str | Path) -> None:
        """Draw one panel for each kind of question; see `Comparison.plot`."""
        draw_shares(self.panels(rows), self.finish_panel, path)

    def panels(self, rows: Sequence[Row]) -> Mapping[str, Mapping[str, Mapping[int, Cell]]]:
        """Return the cells of every panel, by its title."""
        return {self.title_of(kind): cells(self, rows, kind) for kind in self.kinds}


def accuracy_table(comparison: DrawnComparison, rows: Sequence[Row], kind: Kind, what: str) -> Table:
    """Return the shares of right answers to questions of one kind, by system and length; `what` is in the title."""
    return new_table(
        f"{comparison.name}: {what}, {over_seeds(comparison)}",
        [f"{length:,}" for length in comparison.filler_tokens],
        (
            [system, *(str(by_length.get(length, "-")) for length in comparison.filler_tokens)]
            for system, by_length in cells(comparison, rows, kind).items()
        ),
        f"{comparison.num_keys} questions per seed and length; lengths in tokens of filler",
    )
