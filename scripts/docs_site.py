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
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def command_page() -> str:
    """Return the reference of the command line: every command with its arguments and options."""
    import typer

    from transformerfam.cli.app import app

    lines = ["# Command line", ""]
    lines += [
        "Every command, as `--help` says it. An error is one line and status 2; `--traceback` shows its origin.",
        "",
    ]
    lines += _command_lines(typer.main.get_command(app), "fam")
    return "\n".join(lines)


def _command_lines(command: Any, name: str) -> list[str]:
    """Return a section for a command, and those of its subcommands."""
    usage = " ".join(command.collect_usage_pieces(_context(command, name)))
    lines = [f"## `{name}`", "", _plain(command.help or ""), "", f"```text\n{name} {usage}\n```", ""]
    rows = [row for parameter in command.params if (row := _parameter_row(command, name, parameter))]
    if rows:
        lines += ["| | | |", "|---|---|---|", *rows, ""]
    for sub, child in getattr(command, "commands", {}).items():
        lines += _command_lines(child, f"{name} {sub}")
    return lines


def _context(command: Any, name: str) -> Any:
    return command.context_class(command, info_name=name)


def _parameter_row(command: Any, name: str, parameter: Any) -> str | None:
    """Return name, what it takes with its default, and help of one argument or option; None of a hidden one."""
    if getattr(parameter, "hidden", False):
        return None
    context = _context(command, name)
    is_argument = parameter.param_type_name == "argument"
    names = (
        (parameter.metavar or parameter.name).upper()
        if is_argument
        else ", ".join(parameter.opts + parameter.secondary_opts)
    )
    takes = "" if getattr(parameter, "is_flag", False) else parameter.make_metavar(context)
    said = [takes if takes != names else ""]
    if parameter.required:
        said.append("required")
    elif parameter.default not in (None, False, (), "") and not callable(parameter.default):
        said.append(f"default `{getattr(parameter.default, 'value', parameter.default)}`")
    cells = [f"`{names}`", "; ".join(word.replace("|", "\\|") for word in said if word)]
    return "| " + " | ".join([*cells, _plain(parameter.help or "").replace("|", "\\|").replace("\n", " ")]) + " |"


def _plain(help_text: str) -> str:
    """Return help without the marks of rich and of click, safe as Markdown."""
    text = re.sub(r"\[/?(?:bold|dim|italic|cyan|green|red|yellow)[^\]]*\]", "", help_text).replace("\b", "")
    return text.replace("<", "&lt;").replace("*", "\\*").strip()


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
