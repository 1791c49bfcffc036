"""Tensor files: written atomically, read strictly, with a checksum over tensors and metadata."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from filelock import BaseFileLock, FileLock, Timeout, lock_descriptor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from transformerfam.errors import CorruptFileError, TransformerFamError

METADATA_KEY = "transformerfam"
CHECKSUM_KEY = "sha256"
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOCK_SECONDS = 10.0
"""How long a process that is about to end is waited for."""


def digest_tensors(tensors: Mapping[str, torch.Tensor], salt: str = "") -> str:
    """Return the SHA-256 of names, types, shapes and values, as a hexadecimal string.

    Args:
        tensors: by their names; each is looked up when its turn comes, and let go of.
        salt: text that is digested in front of them.
    """
    digest = hashlib.sha256(salt.encode())
    plain: dict[str, tuple[str, str | None]] = {}
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):  # quantized: values, scales and the like
            plain |= {f"{name}.{part}": (name, part) for part in tensor.__tensor_flatten__()[0]}
        else:
            plain[name] = name, None
    for plain_name in sorted(plain):
        name, part = plain[plain_name]
        value = tensors[name] if part is None else getattr(tensors[name], part)
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{plain_name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and metadata so that `path` holds either the old file or the whole new one.

    Args:
        path: file to write; its folder must exist.
        tensors: named tensors; they are stored contiguous.
        metadata: JSON values; `kind` and `format_version` say what the file is.

    Raises:
        TransformerFamError: the folder does not exist, the disk is full, or the file is of another kind or program; an
            old file is left as it was.
    """
    path = as_path(path)
    is_ours(path, metadata["kind"])
    text = json.dumps(dict(metadata), sort_keys=True)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata={METADATA_KEY: text, CHECKSUM_KEY: digest_tensors(stored, text)})


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
        raise TransformerFamError(f"the path is {os.fspath(path)!r}, which is no name of a file ({error})") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise TransformerFamError(f"could not use {path}: {error.strerror}; choose a shorter name") from error
    return Path(path)


def _with_article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new file that takes the place of `path` once the body has written it.

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


def share_rights(folder: str | os.PathLike[str], like: str) -> None:
    """Give weights that safetensors wrote into a folder, for their owner alone to read, the rights of a file there."""
    mode = stat.S_IMODE((Path(folder) / like).stat().st_mode)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(mode)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse to write to what is there and is no file: a folder, a device, a pipe.

    Raises:
        TransformerFamError: it is one.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise TransformerFamError(f"could not write {path}: it is {what}, required is a file; choose another")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder, with those above it, if it is not there.

    Raises:
        TransformerFamError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TransformerFamError(f"could not make the folder {folder}: {error.strerror}; choose another") from error


def hold(path: str | os.PathLike[str], what: str) -> BaseFileLock:
    """Take a lock, which the end of the process releases however it ends.

    Args:
        path: the lock's file; it stays.
        what: what the lock is of, for the message.

    Raises:
        TransformerFamError: another process holds it and does not end within `LOCK_SECONDS`, or no file can be made.
    """
    lock = FileLock(path, timeout=LOCK_SECONDS, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise in_use(what) from error
    except OSError as error:
        raise TransformerFamError(f"could not write {path}: {error.strerror}; choose another folder") from error
    return lock


def hold_file(file: IO[bytes], what: str) -> None:
    """Lock an open file until it is closed; arguments and errors are those of `hold`."""
    end = time.monotonic() + LOCK_SECONDS
    while not lock_descriptor(file.fileno(), blocking=False):
        if time.monotonic() >= end:
            raise in_use(what)
        time.sleep(0.1)


def in_use(what: str) -> TransformerFamError:
    """Return the error of something that another process writes."""
    return TransformerFamError(f"{what} is written by another process; wait for its end, or choose another")


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


def require_target(path: str | os.PathLike[str], kind: str, overwrite: bool = False, option: str = "") -> None:
    """Check before the work that its result can be written.

    Args:
        path: file to write.
        kind: what will be in it, for example "state".
        overwrite: take the place of a file of that kind.
        option: how a user asks for that, for the message.

    Raises:
        TransformerFamError: the folder does not exist or cannot be written, or the file is of another kind, or of this
            kind and not to be overwritten.
    """
    path = as_path(path)
    require_writable(path, or_folder=True)
    if is_ours(path, kind) and not overwrite:
        raise TransformerFamError(f"{path} holds a {kind} already; {option}choose another file")


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


def is_ours(path: Path, kind: str) -> bool:
    """Say whether there is a file of this package and kind; an empty file is as good as none.

    Raises:
        TransformerFamError: there is something else, which must not be overwritten.
    """
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return False
    there = "a folder" if path.is_dir() else "a file that is not of this package"
    if path.is_file():
        with (
            contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError),
            safe_open(str(path), framework="pt") as file,
        ):
            found = parse_json((file.metadata() or {})[METADATA_KEY])["kind"]
            there = _with_article(found)
    if there != _with_article(kind):
        raise TransformerFamError(
            f"could not write {path}: it is {there}, and only {_with_article(kind)} may take the place of "
            f"{_with_article(kind)}; choose another file, or move that one away"
        )
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file so that `path` holds either the old text or the whole new one; errors as `replacing`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a small file so that `path` holds either the old content or the whole new one; errors as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _header_of(content: bytes) -> dict[str, str]:
    """Return the free texts of a safetensors file: its first 8 bytes are the length of a JSON object that has them."""
    length = int.from_bytes(content[:8], "little")
    texts: dict[str, str] = parse_json(content[8 : 8 + length]).get("__metadata__", {})
    return texts


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


def metadata_form(path: str | os.PathLike[str], kind: str) -> contextlib.AbstractContextManager[None]:
    """Return `required_form` of the metadata of a file of some kind."""
    return required_form(f"{path} has metadata of another form than this package writes", f"make the {kind} again")


def require_finite(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], kind: str) -> None:
    """Refuse numbers that are not finite, and types that no state and no memory has.

    Raises:
        CorruptFileError: there is one; the message names its tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in FLOATING):
            raise CorruptFileError(f"{path} has {name} of type {tensor.dtype}, which no {kind} has; make it again")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CorruptFileError(f"{path} has numbers in {name} that are not finite; make the {kind} again")


def refuse_to_write(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse a reading that no load would take.

    Raises:
        TransformerFamError: a tensor has numbers that are not finite; the message names it.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TransformerFamError(
                f"could not write {path}: the reading has numbers in {name} that are not finite, so nothing can be "
                "asked of it; look for such numbers in the model's weights, or load it in float32"
            )


def load_tensors(
    path: str | os.PathLike[str], kind: str, format_version: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Args:
        path: file to read.
        kind: what the file must be, for example "state".
        format_version: the version of that kind's layout that the caller reads.

    Returns:
        The tensors by name and the metadata.

    Raises:
        CorruptFileError: no such file, not a file of this package, of another kind or version, or damaged.
    """
    path = as_path(path)
    try:
        content = read_whole(path)  # at once: `safe_open` opens it twice, and another file may be there by then
        tensors = dict(sorted(load(content).items()))  # in one order in all processes
        header = _header_of(content)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} does not exist; give the path of a saved {kind}") from error
    except (OSError, SafetensorError, UnicodeDecodeError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is no readable safetensors file ({error}); it is truncated or of another program: "
            f"make the {kind} again"
        ) from error
    if METADATA_KEY not in header or CHECKSUM_KEY not in header:
        raise CorruptFileError(f"{path} was not written by transformerfam; give a file that holds a {kind}")
    if digest_tensors(tensors, header[METADATA_KEY]) != header[CHECKSUM_KEY]:
        raise CorruptFileError(f"{path} is damaged: its checksum does not match; make the {kind} again")
    with metadata_form(path, kind):
        metadata = dict(parse_json(header[METADATA_KEY]))
    if metadata.get("kind") != kind:
        raise CorruptFileError(f"{path} holds a {metadata.get('kind')}, required is a {kind}")
    if type(metadata.get("format_version")) is not int or metadata["format_version"] != format_version:
        raise CorruptFileError(
            f"{path} has format version {metadata.get('format_version')!r}, this package reads {format_version}; "
            f"make the {kind} again, or install the package version that wrote it"
        )
    return tensors, metadata
