"""Tables as Markdown, for documents."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from transformerfam.errors import TransformerFamError
from transformerfam.files.writing import require_regular, require_writable, write_text

TABLES = "tables"


def markdown_table(table: Table) -> str:
    """Return a table as Markdown: title, columns, rows and caption."""
    columns = [[str(cell).replace("|", r"\|").replace("\n", "") for cell in column.cells] for column in table.columns]
    headers = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [headers, rules, *zip(*columns, strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    parts = [f"**{table.title}**" if table.title else "", "\n".join(lines), str(table.caption or "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def page_mark(kind: str) -> str:
    """Return the first line of a page of this package, which is not shown."""
    return f"<!-- transformerfam: {kind} -->"


def require_page(path: Path, kind: str = TABLES) -> None:
    """Check before the work that a page can be written.

    Args:
        path: file to write.
        kind: what is on it.

    Raises:
        TransformerFamError: it cannot be written, or there is something else.
    """
    require_regular(path)
    require_writable(path)
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if before and before.partition("\n")[0] != page_mark(kind):
        raise TransformerFamError(
            f"could not write {path}: it does not begin with the line {page_mark(kind)}, as {kind} of this package do; "
            "choose another file, or move that one away"
        )


def write_page(text: str, path: Path, kind: str = TABLES) -> None:
    """Write a page, marked as of this package.

    Args:
        text: Markdown.
        path: file to write.
        kind: what is on it; only a page of the same kind is replaced.

    Raises:
        TransformerFamError: it cannot be written, or there is something else.
    """
    require_page(path, kind)
    write_text(path, f"{page_mark(kind)}\n\n{text}")


def write_markdown(tables: Sequence[Table], path: Path) -> None:
    """Write tables into one file; arguments and errors are those of `write_page`."""
    write_page("\n".join(map(markdown_table, tables)), path)
