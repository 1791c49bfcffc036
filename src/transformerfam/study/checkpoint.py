"""What a study keeps beside its result, all of it replaced atomically: the reading, the rows, and a log."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.files.tensors import load_tensors, metadata_form, require_finite, save_tensors
from transformerfam.study.options import StudyOptions

STUDY_FORMAT_VERSION = 1
KIND = "study"
REMEDY = "resume from a whole copy of it, or start over with --overwrite"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StudyFiles:
    """The files of a study, named after the state that it is to make."""

    save: Path

    def _beside(self, ending: str) -> Path:
        return self.save.with_name(f"{self.save.name}.{ending}")

    @property
    def reading(self) -> Path:
        """The reading, up to its last complete block."""
        return self._beside("reading")

    @property
    def checkpoint(self) -> Path:
        """The rows, and what the next step depends on."""
        return self._beside("study")

    @property
    def log(self) -> Path:
        """One line a step."""
        return self._beside("study.jsonl")

    @property
    def lock(self) -> Path:
        """What keeps other processes away."""
        return self._beside("study.lock")


@dataclass
class Progress:
    """How far a study is.

    Attributes:
        step: steps done.
        seconds: time that they took, all runs together.
        start_loss: of the held-out lessons with the reading's own rows, in nats a token; None before they were asked.
        best_loss: the lowest one.
        best_step: the steps after which it was found.
        num_worse: looks at the held-out lessons since.
    """

    step: int = 0
    seconds: float = 0.0
    start_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    num_worse: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Progress":
        """Build from a file's values.

        Raises:
            ValueError: one is missing, or cannot be.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(names):
            raise ValueError(f"progress has {sorted(values)}")
        for name in ("step", "best_step", "num_worse"):
            if type(values[name]) is not int or values[name] < 0:
                raise ValueError(f"{name} is {values[name]!r}")
        for name in ("seconds", "start_loss", "best_loss"):
            value = values[name]
            if not (value is None and name != "seconds") and not (
                type(value) in (int, float) and 0 <= value < math.inf
            ):
                raise ValueError(f"{name} is {value!r}")
        return cls(**values)


def save_checkpoint(
    path: Path,
    changes: Mapping[int, torch.Tensor],
    best: Mapping[int, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    options: StudyOptions,
) -> None:
    """Write all that the next step depends on, so that `path` holds the old checkpoint or the whole new one.

    Args:
        path: where to.
        changes: what learns, by layer.
        best: what it was when the held-out loss was lowest.
        optimizer: Adam over `changes` from the lowest layer up.
        progress: how far the study is.
        options: what it is made with.

    Raises:
        TransformerFamError: the disk is full; an old checkpoint is left as it was.
    """
    tensors = {f"changes.{i}": tensor for i, tensor in changes.items()}
    tensors |= {f"best.{i}": tensor for i, tensor in best.items()}
    moments = optimizer.state_dict()["state"]
    for number, layer_idx in enumerate(sorted(changes)):
        if number in moments:
            tensors |= {f"{name}.{layer_idx}": moments[number][name] for name in MOMENTS}
    metadata = {
        "kind": KIND,
        "format_version": STUDY_FORMAT_VERSION,
        "progress": dataclasses.asdict(progress),
        "options": options.to_dict(),
    }
    save_tensors(path, tensors, metadata)


def load_checkpoint(
    path: Path, changes: Mapping[int, torch.Tensor], optimizer: torch.optim.Optimizer, options: StudyOptions
) -> tuple[Progress, dict[int, torch.Tensor]]:
    """Put a checkpoint into rows and optimizer.

    Args:
        path: of the checkpoint.
        changes: what learns, by layer; it takes the values that were saved.
        optimizer: Adam over them.
        options: what the study is resumed with.

    Returns:
        How far the study is, and the best rows so far.

    Raises:
        TransformerFamError: the study was made with other options.
        CorruptFileError: there is no checkpoint, or it is damaged.
        StateMismatchError: it is of rows of another shape.
    """
    tensors, metadata = load_tensors(path, KIND, STUDY_FORMAT_VERSION)
    with metadata_form(path, KIND):
        progress, was = Progress.of(metadata["progress"]), dict(metadata["options"])
    now = options.to_dict()
    for name in sorted(now.keys() | was.keys()):
        if now.get(name) != was.get(name):
            raise TransformerFamError(
                f"the study in {path} has {name} = {was.get(name)!r}, given is {now.get(name)!r}; resume it with the "
                "same options, or start over with --overwrite"
            )
    require_finite(tensors, path, KIND)
    kinds = ("changes", "best", *(MOMENTS if progress.step else ()))
    required = {f"{kind}.{i}": tensor for kind in kinds for i, tensor in changes.items()}
    if odd := sorted(required.keys() ^ tensors.keys()):
        what = "lacks" if odd[0] in required else "holds"
        raise CorruptFileError(f"{path} {what} the tensor {odd[0]}; {REMEDY}")
    for name, tensor in required.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != torch.float32:
            raise StateMismatchError(
                f"{path} has {name} as {tensors[name].dtype} {tuple(tensors[name].shape)}, required is torch.float32 "
                f"{tuple(tensor.shape)}; resume with the model that the study was begun with"
            )
    with torch.no_grad():
        for i, tensor in changes.items():
            tensor.copy_(tensors[f"changes.{i}"])
    if progress.step:
        state = {
            number: {"step": torch.tensor(float(progress.step)), **{name: tensors[f"{name}.{i}"] for name in MOMENTS}}
            for number, i in enumerate(sorted(changes))
        }
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    device = next(iter(changes.values())).device
    return progress, {i: tensors[f"best.{i}"].to(device) for i in changes}


def require_fresh(files: StudyFiles, overwrite: bool) -> None:
    """Refuse to begin a study where another one is.

    Raises:
        TransformerFamError: there is one, and it is not to be overwritten.
    """
    if not overwrite and os.path.exists(files.checkpoint):
        raise TransformerFamError(
            f"{files.checkpoint} holds a study already; add --resume to continue it, --overwrite to start over, or "
            "choose another file"
        )
