"""Where a result row comes from: package version, commit, machine, and facts about the model."""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from transformerfam.decoder.memory import memory_of
from transformerfam.errors import CorruptFileError
from transformerfam.files.reading import parse_json, read_whole
from transformerfam.reports.rows import ROW_SCHEMA
from transformerfam.weights.memories import KINDS
from transformerfam.weights.models import BSWA_FOLDER, NAMED_MODELS

UNKNOWN = "unknown"
CARD_FILE = "card.json"
"""Beside an adapter: what was measured after training. Its values go before the notes inside the adapter."""


@cache
def provenance() -> dict[str, Any]:
    """Return the fields `schema`, `version`, `git_commit` and `machine` that every row carries."""
    return {"schema": ROW_SCHEMA, "version": package_version(), "git_commit": git_commit(), "machine": machine()}


def weights_of(model: Any) -> dict[str, str]:
    """Return the fields `weights` and `config` of rows: digests of what answered.

    `weights` is of all weights, those of the memory included; `config` is of the memory's configuration, of which
    fields that have their default do not count, so that a later version's further fields change no digest.

    Args:
        model: one with a memory.
    """
    memory = memory_of(model)
    config, identity = memory.config, memory.identity
    assert identity is not None
    both = f"{identity.base_digest()} {identity.memory_digest()}"
    changed = {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    return {"weights": _short_digest(both), "config": _short_digest(json.dumps(changed, sort_keys=True))}


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def questions_of(*parts: Any) -> dict[str, str]:
    """Return the field `questions` of rows: a digest of what their other fields do not say of the questions.

    Args:
        parts: JSON values: digest of the filler, sentences of a wording, and the like.
    """
    return {"questions": _short_digest(json.dumps(parts))}


def package_version() -> str:
    """Return the installed version of this package, "unknown" if it runs from a plain folder."""
    try:
        return version("transformerfam")
    except PackageNotFoundError:
        return UNKNOWN


def git_commit() -> str:
    """Return the commit of the repository that holds this file, with "+" if it was changed since; else "unknown"."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        tracked = git("ls-files", Path(__file__).name)
        if not tracked:
            return UNKNOWN
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def machine() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    name = platform.processor() or platform.machine() or UNKNOWN
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def device_name(device: torch.device) -> str:
    """Return "cpu", a GPU's own name, or what torch calls another kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_notes(name_or_folder: str | Path, system: str = "fam") -> dict[str, Any]:
    """Return how a trained memory came about: the notes of its training, and the card of its measurements.

    Args:
        name_or_folder: as for `load_model`.
        system: "bswa" returns the notes of the rival trained alike, where there is one.

    Raises:
        CorruptFileError: the adapter or the card cannot be read.
    """
    if str(name_or_folder) in NAMED_MODELS:
        folder = Path(str(importlib.resources.files("transformerfam"))) / "data" / str(name_or_folder)
    else:
        folder = Path(name_or_folder)
    if system == "fam_untrained":
        return {}
    if system == "bswa":
        folder = folder / BSWA_FOLDER
    notes: dict[str, Any] = {}
    for kind in KINDS:
        if (folder / kind.file).is_file():
            notes = kind.notes(folder)
    card = folder / CARD_FILE
    if card.is_file():
        try:
            notes = notes | parse_json(read_whole(card))
        except (ValueError, TypeError) as error:
            raise CorruptFileError(f"{card} is not a JSON object ({error}); copy it again") from error
    return notes
