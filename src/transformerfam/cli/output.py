"""What the commands print: notes to standard error; results to standard output, as texts, tables or a JSON object."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from transformerfam.cli.progress import screen
from transformerfam.cli.verbosity import LEVEL


def say(message: str, always: bool = False) -> None:
    """Print one line to standard error, neither wrapped nor read as markup.

    Args:
        message: the line.
        always: print it even where a command is quiet, as how to resume what was interrupted.
    """
    if always or not LEVEL.is_quiet:
        screen(soft_wrap=True).print(escape(message), highlight=False)


def print_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object on one line; what is no finite number is null."""
    typer.echo(json.dumps(_plain(facts), allow_nan=False))


def _plain(value: Any) -> Any:
    """Return what JSON has for a value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def tell(facts: Mapping[str, Any], message: str, as_json: bool) -> None:
    """Print what a command did: facts as JSON on standard output, or a sentence as a note.

    Args:
        facts: by name.
        message: the same for people.
        as_json: whether JSON is wanted.
    """
    if as_json:
        print_json(facts)
    else:
        say(message)


def print_tables(tables: Iterable[Table | None], as_json: bool = False, **facts: Any) -> None:
    """Print tables, each in the width of the terminal; as JSON, with further facts.

    Args:
        tables: what is to be shown; None is left out.
        as_json: whether JSON is wanted: `{"tables": [{"title", "rows": [{column: cell}]}], ...}`.
        facts: of the JSON object.
    """
    shown = [table for table in tables if table is not None]
    if as_json:
        print_json({**facts, "tables": [table_facts(table) for table in shown]})
        return
    for table in shown:
        print_table(table)


def table_facts(table: Table) -> dict[str, Any]:
    """Return a table's title, caption and rows, each row by the names of the columns."""
    names, rows = _cells(table)
    facts = {"title": _text(table.title), "rows": [dict(zip(names, row, strict=True)) for row in rows]}
    return facts | ({"caption": _text(table.caption)} if table.caption else {})


def print_table(table: Table) -> None:
    """Print a table; one that is too wide for the terminal as a list, row after row. No word is cut."""
    console = Console()
    if _width(table, console) > console.width:
        for column in table.columns:
            column.no_wrap = False  # a long cell may take several lines
    if _width(table, console) <= console.width:
        console.print(table)
        return
    names, rows = _cells(table)
    plain = Console(soft_wrap=True, highlight=False, markup=False)
    plain.print(_text(table.title))
    for row in rows:
        for indent, name, cell in zip(["  ", *["    "] * len(row)], names, row, strict=False):
            plain.print(f"{indent}{name}: {cell}" if name else f"{indent}{cell}")
    if table.caption:
        plain.print(_text(table.caption))


def _width(table: Table, console: Console) -> int:
    """Return the fewest columns of a terminal in which no word of a table is cut."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).minimum


def _cells(table: Table) -> tuple[list[str], Sequence[tuple[str, ...]]]:
    names = [_text(column.header) for column in table.columns]
    columns = [[_text(cell).replace("\n", "") for cell in column.cells] for column in table.columns]
    return names, list(zip(*columns, strict=True))


def _text(part: Any) -> str:
    return Text.from_markup(part).plain if isinstance(part, str) else "" if part is None else str(part)
