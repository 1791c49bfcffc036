"""Hooks of mkdocs: pages that the package writes about itself, and links to the repository's other files.

`reference/commands.md` is made of the help of every command. Pages of the repository outside of `docs/` that a page
links to become pages below `repository/`. Other files are linked to on DOCS_REPOSITORY (https://HOST/OWNER/NAME), or
named without a link where it is not set.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMANDS_PAGE = "reference/commands.md"
OUTSIDE = "repository"
WIDTH = 100
"""Columns of the help texts."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def command_page() -> str:
    """Return the reference of the command line: what `--help` says of every command."""
    import typer

    from transformerfam.cli.app import app

    lines = ["# Command line", ""]
    lines += [
        "Every command, as its `--help` shows it. An error is one line and status 2; `--traceback` shows more.",
        "",
    ]
    for words in _commands(typer.main.get_command(app), []):
        lines += [f"## `{' '.join(['fam', *words])}`", "", "```text", _help(app, words), "```", ""]
    return "\n".join(lines)


def _commands(command: Any, words: list[str]) -> list[list[str]]:
    """Return the words of a command and of all below it."""
    below = getattr(command, "commands", {})
    return [words, *(found for name, child in below.items() for found in _commands(child, [*words, name]))]


def _help(app: Any, words: list[str]) -> str:
    """Return a command's help as plain text of one width, without colours."""
    from typer.testing import CliRunner

    plain = {"TERMINAL_WIDTH": str(WIDTH), "COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb"}
    said = CliRunner().invoke(app, [*words, "--help"], prog_name="fam", env=plain)
    if said.exit_code != 0:
        raise RuntimeError(f"fam {' '.join(words)} --help ended with status {said.exit_code}: {said.output}")
    return "\n".join(line.rstrip() for line in said.output.strip("\n").splitlines())


def pages_outside() -> list[Path]:
    """Return pages and pictures outside of `docs/` that pages link to, directly or from one another."""
    found: list[Path] = []
    queue = sorted(DOCS.rglob("*.md"))
    while queue:
        page = queue.pop()
        for _, _, target, _ in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            is_shown = path.suffix in (".md", ".svg", ".png") and path.is_file() and path.is_relative_to(ROOT)
            if is_shown and not path.is_relative_to(DOCS) and path not in found:
                found.append(path)
                queue += [path] if path.suffix == ".md" else []
    return found


def place(path: Path) -> str:
    """Return where a file of the repository is in the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def relinked(text: str, page: Path, shown: set[Path]) -> str:
    """Return a page's text with links that lead to where the site has their targets."""

    def changed(match: re.Match[str]) -> str:
        mark, label, target, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        path = (page.parent / target).resolve()
        if path.is_relative_to(DOCS) or path in shown:
            relative = os.path.relpath(place(path), PurePosixPath(place(page)).parent)
            return f"{mark}[{label}]({relative}{anchor})"
        repository = os.environ.get("DOCS_REPOSITORY", "")
        name = path.relative_to(ROOT).as_posix()
        if repository:
            return f"[{label}]({repository}/blob/main/{name})"
        return label if label.strip("`") == name else f"{label} (`{name}`)"

    return LINK.sub(changed, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in `docs/`."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, COMMANDS_PAGE, content=command_page()))
    for path in pages_outside():
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links of a page; without a repository to link to, name what they led to."""
    if page.file.src_uri == COMMANDS_PAGE:
        return markdown
    return relinked(markdown, Path(page.file.abs_src_path), set(pages_outside()))
