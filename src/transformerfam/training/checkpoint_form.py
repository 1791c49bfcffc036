"""The form of a checkpoint: which tensors and values it has to hold, whatever its checksum says."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformerfam.errors import CorruptFileError
from transformerfam.files.tensors import require_finite

REMEDY = "resume from a whole copy of it, or start over by --overwrite"
COUNTS = ("step", "stage_idx", "steps_in_stage", "num_tokens")
TIMES = ("seconds", "cpu_seconds")
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
"""Of AdamW, what every parameter has that ever had a gradient."""
PARTS = ("model.", "average.", "optimizer.", "filler.")
SINGLE = ("passed_fam", "torch_rng")
TENSOR_NAMES = "tensor_names"
"""Key of the metadata; checkpoints of earlier versions have none."""


def require_progress(metadata: Mapping[str, Any], path: Path) -> None:
    """Check the progress that a checkpoint states.

    Args:
        metadata: of the file.
        path: the file, for messages.

    Raises:
        CorruptFileError: a value is missing, or cannot be.
    """
    progress = metadata.get("progress")
    _require(isinstance(progress, dict), path, "progress", progress, "an object with the step and what goes with it")
    assert isinstance(progress, dict)
    for name in COUNTS:
        _require(
            _is_count(progress.get(name)), path, f"progress.{name}", progress.get(name), "an integer of at least 0"
        )
    for name in TIMES:
        value: Any = progress.get(name)
        is_time = _is_number(value) and 0 <= value < math.inf
        _require(is_time, path, f"progress.{name}", value, "a finite number of at least 0")
    shares, devices = progress.get("accuracies"), progress.get("devices", [])
    are_shares = isinstance(shares, list) and all(_is_number(share) and 0 <= share <= 1 for share in shares)
    _require(are_shares, path, "progress.accuracies", shares, "a list of numbers from 0 to 1")
    are_names = isinstance(devices, list) and all(isinstance(name, str) for name in devices)
    _require(are_names, path, "progress.devices", devices, "a list of names")
    started, keys, num_shares = (metadata.get(name) for name in ("passing_started", "passed_keys", "num_shares"))
    _require(isinstance(started, bool), path, "passing_started", started, "true or false")
    are_keys = keys is None or (
        isinstance(keys, list) and all(k is None or _is_count(k) or _are_questions(k) for k in keys)
    )
    _require("passed_keys" in metadata and are_keys, path, "passed_keys", keys, "null, or a list with one key per row")
    _require(num_shares is None or _is_count(num_shares), path, "num_shares", num_shares, "an integer of at least 0")


def _are_questions(value: Any) -> bool:
    """Return whether a value is a list of questions, each with its answer, and some with the sentences that give it."""
    return isinstance(value, list) and all(
        isinstance(question, list)
        and len(question) in (2, 3)
        and all(isinstance(ids, list) and all(map(_is_count, ids)) for ids in question[:2])
        and all(ids is None or (isinstance(ids, list) and all(map(_is_count, ids))) for ids in question[2:])
        for question in value
    )


def require_tensors(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, torch.Tensor],
    path: Path,
) -> None:
    """Check that a checkpoint holds all tensors that a trainer resumes from, and no others.

    Args:
        tensors: of the file, those that processes sharded included.
        metadata: of the file, which `require_progress` has checked.
        model: with its trainable weights.
        optimizer: of them.
        averages: of them; none where no average is kept.
        path: the file, for messages.

    Raises:
        CorruptFileError: one is missing, of another shape or type, not finite, or of nothing here.
    """
    parameters = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    stored = {name for name in tensors if name.startswith("model.")}
    if stored != set(parameters) or any(tensors[n].shape != p.shape for n, p in parameters.items()):
        raise CorruptFileError(f"{path} holds the weights of another model; resume with the recipe that it was made by")
    names = metadata.get(TENSOR_NAMES)
    _require(names is None or isinstance(names, list), path, TENSOR_NAMES, names, "a list of names")
    required = {"torch_rng", *(f"average.{name}" for name in averages), *(names or ())}
    if metadata["passed_keys"] is not None:
        required.add("passed_fam")
    if any(name.startswith("filler.") for name in tensors):
        required |= {f"filler.{name}" for name in ("ids", "keys", "values")}
    if missing := sorted(required - set(tensors)):
        raise CorruptFileError(f"{path} lacks the tensor {missing[0]}; {REMEDY}")
    for name in tensors:
        is_known = name.startswith(PARTS) or name in SINGLE
        if not is_known or (names is not None and name not in names):
            raise CorruptFileError(f"{path} holds the tensor {name}, which is of nothing here; {REMEDY}")
    for name, value in averages.items():
        _require_shape(tensors, f"average.{name}", value.shape, path)
    _require_moments(tensors, metadata["progress"]["step"], optimizer, path)
    rng = tensors["torch_rng"]
    _require_shape(tensors, "torch_rng", torch.get_rng_state().shape, path)
    _require(rng.dtype == torch.uint8, path, "torch_rng", rng.dtype, "torch.uint8")
    if metadata["passed_keys"] is not None:
        shape, num_rows = tuple(tensors["passed_fam"].shape), len(metadata["passed_keys"])
        _require(
            len(shape) == 4 and shape[1] == num_rows, path, "passed_fam", shape, f"four dimensions, {num_rows} rows"
        )
    require_finite(tensors, path, "checkpoint")


def _require_moments(
    tensors: Mapping[str, torch.Tensor], step: int, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    """Check the optimizer's averages: of AdamW all of a parameter's, and of any optimizer none of another parameter."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, set[str]] = {}
    for full_name in tensors:
        if full_name.startswith("optimizer."):
            number, _, name = full_name.removeprefix("optimizer.").partition(".")
            is_known = number.isdecimal() and int(number) < len(trained)
            _require(is_known, path, full_name, "there", f"only parameters 0 to {len(trained) - 1}")
            found.setdefault(int(number), set()).add(name)
    if step > 0 and not found:
        raise CorruptFileError(f"{path} is of step {step} and lacks the optimizer's averages; {REMEDY}")
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for index, names in found.items():
        if names != MOMENTS:
            name = min(names ^ MOMENTS)
            raise CorruptFileError(
                f"{path} has {', '.join(sorted(names))} of the optimizer's parameter {index}, required are "
                f"{', '.join(sorted(MOMENTS))}: {name} differs; {REMEDY}"
            )
        for name in MOMENTS - {"step"}:
            _require_shape(tensors, f"optimizer.{index}.{name}", trained[index].shape, path)


def _require_shape(tensors: Mapping[str, torch.Tensor], name: str, shape: torch.Size, path: Path) -> None:
    found = tensors[name].shape
    _require(found == shape, path, name, f"of shape {tuple(found)}", f"{tuple(shape)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(holds: bool, path: Path, name: str, value: Any, required: str) -> None:
    if not holds:
        raise CorruptFileError(
            f"{path} has metadata of another form than this package writes: {name} is {str(value)[:60]}, required is "
            f"{required}; {REMEDY}"
        )
