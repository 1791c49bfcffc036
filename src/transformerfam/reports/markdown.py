"""Tables as Markdown, for documents."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from transformerfam.errors import TransformerFamError
from transformerfam.files import write_text


def markdown_table(table: Table) -> str:
    """Return a table as Markdown: title, columns, rows and caption."""
    columns = [[str(cell).replace("|", r"\|").replace("\n", "") for cell in column.cells] for column in table.columns]
    headers = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [headers, rules, *zip(*columns, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    parts = [f"**{table.title}**" if table.title else "", "\n".join(lines), str(table.caption or "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_markdown(tables: Sequence[Table], path: Path) -> None:
    """Write tables into one file.

    Raises:
        TransformerFamError: it cannot be written, or the file begins with something else than a table.
    """
    before = path.read_text(encoding="utf-8", errors="replace").lstrip() if path.is_file() else ""
    if before and not before.startswith(("|", "**")):
        raise TransformerFamError(
            f"could not write {path}: it holds something else than tables; choose another file, or move that one away"
        )
    write_text(path, "\n".join(map(markdown_table, tables)))
