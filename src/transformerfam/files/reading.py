"""Small files and texts read whole: nothing without an end, and every fault as one kind of error."""

import contextlib
import errno
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError, TransformerFamError


def refuse_endless(path: str | os.PathLike[str]) -> None:
    """Refuse a named pipe, whose opening waits for a writer that may never come, and a device, which may never end.

    Raises:
        OSError: it is one; callers say what they need in its place.
    """
    try:
        is_fifo = stat.S_ISFIFO(os.lstat(os.path.realpath(path)).st_mode)  # a shell's `<(command)` has no such name
    except (OSError, ValueError):
        is_fifo = False
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # opening it says why
        return
    if is_fifo:
        raise OSError(errno.ESPIPE, "it is a named pipe; read it from standard input, or copy it to a file")
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "it is a device; read it from standard input, or copy it to a file")


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: it cannot be read, or is a named pipe or a device.
    """
    refuse_endless(path)
    return Path(path).read_bytes()


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is none, is no UTF-8, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str | bytes) -> dict[str, Any]:
    """Return the values of a TOML text.

    Raises:
        ValueError: it is none, is no UTF-8, or is nested too deeply.
    """
    try:
        return tomllib.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_lines(path: Path, remedy: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON lines file with their line numbers, one line at a time; empty lines are left out.

    Args:
        path: the file.
        remedy: what a line is to be, for the message.

    Raises:
        CorruptFileError: a line is no JSON.
        TransformerFamError: the file cannot be read.
    """
    try:
        refuse_endless(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    with required_form(f"{path}, line {number} has another form", remedy):
                        values = parse_json(line)
                    yield number, values
    except OSError as error:
        raise TransformerFamError(f"cannot read {str(path)!r}: {error.strerror}; check it") from error


@contextlib.contextmanager
def required_form(found: str, remedy: str) -> Iterator[None]:
    """Take what goes wrong in the body, which reads stored values, for values of another form than is required.

    Args:
        found: what has that form, for the message.
        remedy: what to do.

    Raises:
        CorruptFileError: with what went wrong.
    """
    try:
        yield
    except TransformerFamError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{found} ({type(error).__name__}: {error}); {remedy}") from error
