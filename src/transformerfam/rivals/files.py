"""The file of a trained rival, next to the base weights that it was trained with."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.memory import memory_of
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.files.tensors import load_tensors, metadata_form, require_finite, save_tensors
from transformerfam.rivals.attach import attach
from transformerfam.rivals.config import RivalConfig
from transformerfam.rivals.rival import RivalModel

RIVAL_FILE = "rival.safetensors"
RIVAL_FORMAT_VERSION = 1


def save_rival(model: PreTrainedModel, folder: str | os.PathLike[str], notes: Mapping[str, Any] | None = None) -> None:
    """Write what a rival has learned.

    Args:
        model: with the rival, trained in full.
        folder: with the base weights.
        notes: free JSON values, for example how it was trained.
    """
    rival = memory_of(model)
    assert rival.identity is not None
    metadata = {
        "kind": "rival",
        "format_version": RIVAL_FORMAT_VERSION,
        "rival_config": rival.config.to_dict(),
        "base_digest": rival.identity.base_digest(),
        "notes": dict(notes or {}),
    }
    save_tensors(Path(folder) / RIVAL_FILE, dict(rival.named_parameters()), metadata)


def notes_of_rival(folder: Path) -> dict[str, Any]:
    """Return the notes in a trained rival's file."""
    notes: dict[str, Any] = load_tensors(folder / RIVAL_FILE, "rival", RIVAL_FORMAT_VERSION)[1]["notes"]
    return notes


class TrainedRival(NamedTuple):
    """What a file says of a trained rival."""

    path: Path
    config: RivalConfig
    tensors: dict[str, torch.Tensor]
    base_digest: str

    @classmethod
    def read(cls, folder: Path, system: str) -> "TrainedRival":
        """Read what `save_rival` wrote.

        Raises:
            TransformerFamError: the folder has no trained rival, or another one than `system`.
        """
        path = folder / RIVAL_FILE
        if not path.is_file():
            raise TransformerFamError(
                f"{folder} has no trained {system} ({RIVAL_FILE} is missing); train one by a recipe with a rival "
                "section"
            )
        tensors, metadata = load_tensors(path, "rival", RIVAL_FORMAT_VERSION)
        require_finite(tensors, path, "rival")
        with metadata_form(path, "rival"):
            config = RivalConfig.from_dict(metadata["rival_config"])
            base_digest, _ = str(metadata["base_digest"]), dict(metadata["notes"])
        if config.system != system:
            raise TransformerFamError(
                f"{folder} holds a trained {config.system}, requested is {system!r}; name that system"
            )
        return cls(path, config, tensors, base_digest)

    def attach(self, model: PreTrainedModel, overrides: Mapping[str, Any] | None = None) -> RivalModel:
        """Give a model the rival that was trained with it.

        Args:
            model: the folder's base, without a memory.
            overrides: fields of `RivalConfig` to change.

        Raises:
            StateMismatchError: the base weights, or the configuration, are not those that it was trained with.
        """
        attached = attach(model, RivalConfig.from_dict(self.config.to_dict() | dict(overrides or {})))
        rival = memory_of(model)
        assert rival.identity is not None
        if rival.identity.base_digest() != self.base_digest:
            raise StateMismatchError(
                f"{self.path.parent} holds other base weights than its {self.config.system} was trained with; copy it "
                "again"
            )
        parameters = dict(rival.named_parameters())
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        required = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if shapes != required:
            name = next(n for n in sorted({*shapes, *required}) if shapes.get(n) != required.get(n))
            raise StateMismatchError(
                f"{self.path} has {name} of shape {shapes.get(name)}, required is {required.get(name)}; load it with "
                "the configuration that it was trained with"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[name])
        return attached
