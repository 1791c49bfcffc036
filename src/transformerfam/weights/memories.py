"""The kinds of memory, one row each: how a model is given one, and the file in which a trained one is kept.

Whatever serves any memory goes through these rows. What only FAM has, as LoRA and its variants without training, is in
`adapter` and `models`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.model import ModelWithMemory
from transformerfam.fam.convert import convert
from transformerfam.rivals import RIVAL_NAMES, RivalConfig, attach
from transformerfam.rivals.files import RIVAL_FILE, TrainedRival, notes_of_rival, save_rival
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.folders import FAM_FILE

System = Literal["fam", "bswa", "fam_untrained"]
"""Names by which `load_model` loads FAM."""

MemoryConfig = FamConfig | RivalConfig
"""The configuration of a memory; its type says of which kind."""

Giver = Callable[[PreTrainedModel, Mapping[str, Any] | None], ModelWithMemory[Any]]
"""Gives a base model a trained memory, with changed fields of its configuration."""


@dataclass(frozen=True, kw_only=True)
class MemoryKind:
    """What a caller that serves any memory needs of one kind."""

    config: type[MemoryConfig]
    """Its configuration."""

    systems: tuple[str, ...]
    """Names by which `load_model` loads it."""

    file: str
    """Name of its file, next to the base weights."""

    contents: str
    """What the file says that it holds."""

    attach: Callable[[PreTrainedModel, Any], ModelWithMemory[Any]]
    """Gives a model the memory of a configuration, untrained."""

    take: Callable[[PreTrainedModel, dict[str, Any]], Callable[[Path], None]]
    """Takes the memory of a model, with notes, and returns what writes its file into a folder."""

    notes: Callable[[Path], dict[str, Any]]
    """Reads the notes in a folder's file."""

    read: Callable[[Path, str], Giver] | None
    """Reads a folder's file for a system; None for FAM, which `load_model` reads with all its options."""


FAM = MemoryKind(
    config=FamConfig,
    systems=get_args(System),
    file=FAM_FILE,
    contents="adapter",
    attach=convert,
    take=lambda model, notes: FamAdapter.from_model(model, notes=notes).save_pretrained,
    notes=lambda folder: FamAdapter.from_pretrained(folder).notes,
    read=None,
)
KINDS = (
    FAM,
    MemoryKind(
        config=RivalConfig,
        systems=RIVAL_NAMES,
        file=RIVAL_FILE,
        contents="rival",
        attach=attach,
        take=lambda model, notes: functools.partial(save_rival, model, notes=notes),
        notes=notes_of_rival,
        read=lambda folder, system: TrainedRival.read(folder, system).attach,
    ),
)
MEMORY_FILES = {kind.file: kind.contents for kind in KINDS}


def kind_of(config: MemoryConfig) -> MemoryKind:
    """Return the kind of memory that a configuration is of."""
    return next(kind for kind in KINDS if isinstance(config, kind.config))


def give_memory(model: PreTrainedModel, config: MemoryConfig) -> ModelWithMemory[Any]:
    """Give a model the untrained memory of a configuration, of any kind, in place; see `convert`."""
    return kind_of(config).attach(model, config)


def kind_to_load(folder: Path, system: str) -> MemoryKind:
    """Return the kind that a system is of, or that a folder holds; FAM where neither is of another kind."""
    others = [kind for kind in KINDS if kind.read is not None]
    return next((kind for kind in others if system in kind.systems or (folder / kind.file).is_file()), FAM)
