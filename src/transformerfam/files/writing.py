"""Files written so that a path holds either the old content or the whole new one."""

import contextlib
import errno
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from transformerfam.errors import TransformerFamError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new file that replaces `path` once the body has written it.

    A link stays, and what it leads to is replaced. An old file keeps its rights, a new one has those of the umask.

    Raises:
        TransformerFamError: the folder does not exist, the disk is full, or something else than a file is there; an old
            file is left as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    require_regular(path)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))  # safetensors puts a file there that its owner alone may read
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise TransformerFamError(
            f"could not write {path}: {error}; a file that was there before is unchanged; free space or choose "
            "another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file so that `path` holds either the old text or the whole new one; errors as `replacing`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a small file so that `path` holds either the old content or the whole new one; errors as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def share_rights(folder: str | os.PathLike[str], like: str) -> None:
    """Give weights that safetensors wrote into a folder, for their owner alone to read, the rights of a file there."""
    mode = stat.S_IMODE((Path(folder) / like).stat().st_mode)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(mode)


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder, with those above it, if it is not there.

    Raises:
        TransformerFamError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TransformerFamError(f"could not make the folder {folder}: {error.strerror}; choose another") from error


def as_path(path: Any) -> Path:
    """Return a path.

    Raises:
        TransformerFamError: it is none, or no file can have such a name.
    """
    if not isinstance(path, str | os.PathLike):
        raise TransformerFamError(f"the path is {path!r}, required is the name of a file")
    try:
        os.lstat(path)
    except ValueError as error:  # a null byte
        raise TransformerFamError(f"the path is {os.fspath(path)!r}, which is not a file name ({error})") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise TransformerFamError(f"could not use {path}: {error.strerror}; choose a shorter name") from error
    return Path(path)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse to write to what is there and is no file: a folder, a device, a pipe.

    Raises:
        TransformerFamError: it is one.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise TransformerFamError(f"could not write {path}: it is {what}, required is a file; choose another")


def require_writable(path: Path, or_folder: bool = False) -> None:
    """Check that a file can be written.

    Args:
        path: the file.
        or_folder: leave it to others to say that the path is a folder.

    Raises:
        TransformerFamError: its folder does not exist or cannot be written, or it is a folder itself.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir() and not or_folder:
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise TransformerFamError(
            f"could not write {path}: {error.strerror}; make its folder, or choose another one"
        ) from error
