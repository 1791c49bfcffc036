"""Next-token loss and accuracy: a table for the terminal."""

from collections.abc import Iterable

from rich.table import Table

from transformerfam.reports.rows import Row, mixed_commits, require_alike


def next_token_table(rows: Iterable[Row]) -> Table | None:
    """Return loss and accuracy of every next-token row; None without such rows.

    Raises:
        StateMismatchError: rows of one model and system are of different weights or configurations.
    """
    chosen = [row for row in rows if row["task"] == "next-token"]
    if not chosen:
        return None
    known: dict[tuple[str, str], Row] = {}
    for row in chosen:
        require_alike(row, known.setdefault((str(row["model"]), row["system"]), {}))
    table = Table(title="Next-token prediction (loss in nats per token)", caption=mixed_commits(chosen) or None)
    for name in ("model", "system", "file"):
        table.add_column(name)
    for name in ("tokens", "loss", "accuracy"):
        table.add_column(name, justify="right")
    for row in chosen:
        first = row["first_token"]
        table.add_row(
            str(row["model"]),
            row["system"],
            row["file"],
            f"{first:,} to {first + row['num_tokens']:,}",
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.4f}",
        )
    return table
