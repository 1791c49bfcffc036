"""Append the rows of an evaluation as they come."""

from collections.abc import Iterable

import typer

from transformerfam.cli.output import say
from transformerfam.processes import INTERRUPTED
from transformerfam.reports.rows import Row, RowFile


def append_rows(file: RowFile, rows: Iterable[Row]) -> None:
    """Append rows one by one; Ctrl-C ends the command, and the file keeps what is done.

    Raises:
        typer.Exit: Ctrl-C.
    """
    try:
        for row in rows:
            file.append(row)
    except KeyboardInterrupt as interrupt:
        say(
            f"interrupted; {file.path} keeps {len(file.rows)} rows; run the same command again to continue", always=True
        )
        raise typer.Exit(INTERRUPTED) from interrupt
