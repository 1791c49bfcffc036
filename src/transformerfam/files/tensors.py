"""Tensor files: written atomically, read strictly, with a checksum over tensors and metadata."""

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.reading import parse_json, read_whole, required_form
from transformerfam.files.writing import as_path, replacing, require_writable

METADATA_KEY = "transformerfam"
CHECKSUM_KEY = "sha256"
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def digest_tensors(tensors: Mapping[str, torch.Tensor], salt: str = "") -> str:
    """Return the SHA-256 of names, types, shapes and values, as a hexadecimal string.

    Args:
        tensors: by their names; each is looked up when its turn comes, and then freed.
        salt: text that is digested before them.
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


def load_tensors(
    path: str | os.PathLike[str], kind: str, format_version: int, older_versions: Collection[int] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file that `save_tensors` wrote.

    Args:
        path: file to read.
        kind: what the file must be, for example "state".
        format_version: the version of that kind's layout that the caller reads.
        older_versions: further ones that it reads.

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
            f"{path} is not a readable safetensors file ({error}); it is truncated or of another program: "
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
    if type(metadata.get("format_version")) is not int or metadata["format_version"] not in (
        format_version,
        *older_versions,
    ):
        raise CorruptFileError(
            f"{path} has format version {metadata.get('format_version')!r}, this package reads {format_version}; "
            f"make the {kind} again, or install the package version that wrote it"
        )
    return tensors, metadata


def _header_of(content: bytes) -> dict[str, str]:
    """Return the free texts of a safetensors file: its first 8 bytes are the length of a JSON object that has them."""
    length = int.from_bytes(content[:8], "little")
    texts: dict[str, str] = parse_json(content[8 : 8 + length]).get("__metadata__", {})
    return texts


def metadata_form(path: str | os.PathLike[str], kind: str) -> contextlib.AbstractContextManager[None]:
    """Return `required_form` of the metadata of a file of some kind."""
    return required_form(f"{path} has metadata of another form than this package writes", f"make the {kind} again")


def is_ours(path: Path, kind: str) -> bool:
    """Return whether there is a file of this package and kind; an empty file is as good as none.

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
            f"could not write {path}: it is {there}, and only {_with_article(kind)} may replace "
            f"{_with_article(kind)}; choose another file, or move that one away"
        )
    return True


def _with_article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def require_target(path: str | os.PathLike[str], kind: str, overwrite: bool = False, option: str = "") -> None:
    """Check before the work that its result can be written.

    Args:
        path: file to write.
        kind: what will be in it, for example "state".
        overwrite: replace a file of that kind.
        option: how a user selects that, for the message.

    Raises:
        TransformerFamError: the folder does not exist or cannot be written, or the file is of another kind, or of this
            kind and not to be overwritten.
    """
    path = as_path(path)
    require_writable(path, or_folder=True)
    if is_ours(path, kind) and not overwrite:
        raise TransformerFamError(f"{path} holds a {kind} already; {option}choose another file")


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
                f"could not write {path}: the reading has numbers in {name} that are not finite, so it "
                "cannot be queried; look for such numbers in the model's weights, or load it in float32"
            )
