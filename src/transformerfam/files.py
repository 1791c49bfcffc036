"""Tensor files: written atomically, read strictly, with a checksum over tensors and metadata."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from transformerfam.errors import CorruptFileError, TransformerFamError

METADATA_KEY = "transformerfam"
CHECKSUM_KEY = "sha256"


def digest_tensors(tensors: Mapping[str, torch.Tensor], salt: str = "") -> str:
    """Return the SHA-256 of names, types, shapes and values, as a hexadecimal string."""
    digest = hashlib.sha256(salt.encode())
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):  # quantized: values, scales and the like
            plain |= {f"{name}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
        else:
            plain[name] = tensor
    for name in sorted(plain):
        tensor = plain[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
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
        TransformerFamError: the folder does not exist or the disk is full; an old file is left as it was.
    """
    path = Path(path)
    text = json.dumps(dict(metadata), sort_keys=True)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {METADATA_KEY: text, CHECKSUM_KEY: digest_tensors(stored, text)}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(stored, temporary, metadata=header)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise TransformerFamError(
            f"could not write {path}: {error}; a file that was there before is unchanged; free space or choose "
            "another folder"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small text file so that `path` holds either the old text or the whole new one.

    Raises:
        TransformerFamError: the folder does not exist or the disk is full; an old file is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TransformerFamError(
            f"could not write {path}: {error}; a file that was there before is unchanged; free space or choose "
            "another folder"
        ) from error


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
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
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
    metadata = json.loads(header[METADATA_KEY])
    if metadata.get("kind") != kind:
        raise CorruptFileError(f"{path} holds a {metadata.get('kind')}, required is a {kind}")
    if metadata.get("format_version") != format_version:
        raise CorruptFileError(
            f"{path} has format version {metadata.get('format_version')}, this package reads {format_version}; "
            f"make the {kind} again, or install the package version that wrote it"
        )
    return tensors, metadata
