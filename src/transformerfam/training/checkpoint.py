"""What a run keeps: its recipe, and in safetensors files, replaced atomically, all that the next step depends on.

Where several processes shard the layers' weights, each writes its own shares of weights, averages and
moments; they are joined when the run resumes, in any number of processes.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from transformerfam.errors import CorruptFileError, RecipeError, TransformerFamError
from transformerfam.files.reading import parse_json, read_whole
from transformerfam.files.tensors import load_tensors, metadata_form, save_tensors
from transformerfam.files.writing import write_text
from transformerfam.tasks.batch import Held
from transformerfam.tasks.question import Question
from transformerfam.training.checkpoint_form import REMEDY, TENSOR_NAMES, require_progress, require_tensors
from transformerfam.training.optimizer import AverageOfWeights
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.removed import without_removed
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.sharding import shared_like
from transformerfam.training.state_passing import SavedFam, StatePassing
from transformerfam.training.step.stored_filler import StoredFiller
from transformerfam.weights.folders import CHECKPOINT_FILE

RECIPE_FILE = "recipe.json"
SOURCES = "sources"
"""Key of a run's recipe for the SHA-256 of the files that it read."""
CHECKPOINT_FORMAT_VERSION = 1
LOG_BEGINS = b'{"step": '


def _share_file(step: int, rank: int, world: int) -> str:
    return f"checkpoint-{step}-{rank + 1}-of-{world}.safetensors"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of a run's processes this one is.

    Attributes:
        rank: its number.
        world: how many there are.
        wait: waits for the others.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AverageOfWeights,
    passing: StatePassing,
    progress: dict[str, Any],
    random_state: torch.Tensor,
    stored: StoredFiller | None = None,
    place: Place | None = None,
) -> None:
    """Write `folder/checkpoint.safetensors`, and every process's shares of sharded weights next to it.

    Args:
        folder: where to.
        model: its trainable weights are stored; the others come from the base model.
        optimizer: its moments are stored in the order of its parameters.
        average: the moving average of the weights.
        passing: the saved FAM.
        progress: JSON values: step, stage, recipe and what else the trainer needs.
        random_state: what the next random number depends on.
        stored: the stored filler, None where the recipe has none.
        place: which process this is; None is the only one.

    Raises:
        TransformerFamError: the disk is full; an old checkpoint is left as it was.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors: dict[str, torch.Tensor] = {f"model.{name}": value for name, value in trained.items()}
    tensors |= {f"average.{name}": value for name, value in average.values.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    if passing.saved is not None:
        tensors["passed_fam"] = passing.saved.fam_LBFD
    if stored is not None:
        tensors |= {f"filler.{name}": tensor for name, tensor in stored.tensors().items()}
    tensors["torch_rng"] = random_state
    metadata = {
        "kind": "checkpoint",
        "format_version": CHECKPOINT_FORMAT_VERSION,
        "progress": progress,
        "passing_started": passing.started,
        "passed_keys": None if passing.saved is None else list(passing.saved.keys),
    }
    place, step = place or Place(), progress["step"]
    shares = {name: tensor.to_local() for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    metadata |= {"num_shares": place.world if shares else 0, TENSOR_NAMES: sorted(tensors)}
    if shares:
        kind = {"kind": "share of a checkpoint", "format_version": CHECKPOINT_FORMAT_VERSION}
        save_tensors(folder / _share_file(step, place.rank, place.world), shares, kind)
        place.wait()
    if place.rank > 0:
        return
    save_tensors(folder / CHECKPOINT_FILE, {n: t for n, t in tensors.items() if n not in shares}, metadata)
    current = {_share_file(step, rank, place.world) for rank in range(place.world)}
    for old in folder.glob("checkpoint-*-of-*.safetensors"):
        if old.name not in current:
            old.unlink()


def _joined_shares(folder: Path, step: int, world: int) -> dict[str, torch.Tensor]:
    """Return the whole of what the processes wrote their shares of: rows of every tensor, process after process."""
    by_rank = [
        load_tensors(folder / _share_file(step, rank, world), "share of a checkpoint", CHECKPOINT_FORMAT_VERSION)[0]
        for rank in range(world)
    ]
    return {name: torch.cat([shares[name] for shares in by_rank]) for name in by_rank[0]}


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AverageOfWeights,
    passing: StatePassing,
    num_stages: int,
) -> tuple[dict[str, Any], torch.Tensor, StoredFiller | None]:
    """Put a checkpoint into model, optimizer, average and state passing.

    Args:
        folder: of the run.
        model: takes its trainable weights.
        optimizer: takes its averages.
        average: takes the moving average of the weights.
        passing: takes the saved FAM.
        num_stages: stages of the recipe's curriculum.

    Returns:
        The `progress` that was saved, what the next random number depends on, and the stored filler.

    Raises:
        CorruptFileError: there is no checkpoint, it is damaged, or it does not fit the recipe's model.
    """
    path = folder / CHECKPOINT_FILE
    tensors, metadata = load_tensors(path, "checkpoint", CHECKPOINT_FORMAT_VERSION)
    require_progress(metadata, path)
    stage_idx = metadata["progress"]["stage_idx"]
    if stage_idx >= num_stages:
        raise CorruptFileError(
            f"{path} is of stage {stage_idx} of the curriculum, which has the stages 0 to {num_stages - 1}; {REMEDY}"
        )
    if metadata.get("num_shares"):
        with metadata_form(path, "checkpoint"):
            tensors |= _joined_shares(folder, metadata["progress"]["step"], metadata["num_shares"])
    require_tensors(tensors, metadata, model, optimizer, average.values, path)
    parameters = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    device = next(model.parameters()).device
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shared_like(tensors[name], parameter))
        for name, value in average.values.items():
            value.copy_(shared_like(tensors[f"average.{name}"], value))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        part, _, rest = full_name.partition(".")
        if part == "optimizer":
            index, _, name = rest.partition(".")
            moments.setdefault(int(index), {})[name] = shared_like(tensor, trained[int(index)])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    keys = metadata["passed_keys"]
    passing.saved = None if keys is None else SavedFam(tensors["passed_fam"].to(device), tuple(map(_held, keys)))
    passing.started = metadata["passing_started"]
    filler = {name.removeprefix("filler."): tensor for name, tensor in tensors.items() if name.startswith("filler.")}
    stored = StoredFiller.from_tensors(filler, device) if filler else None
    return metadata["progress"], tensors["torch_rng"], stored


def _held(stored: int | list[list[Any]] | None) -> Held | None:
    """Return what a row's memory holds; of questions JSON has lists."""
    return tuple(Question.of(*parts) for parts in stored) if isinstance(stored, list) else stored


def cut_log(path: Path, num_steps: int) -> None:
    """Drop the lines that were written after the checkpoint, and a line that a killed run left unfinished.

    Raises:
        CorruptFileError: a line is of something else, or of no later step; the message gives its number.
    """
    if not path.exists():
        return
    kept, last = [], -1
    for number, line in enumerate(read_whole(path).splitlines(keepends=True), start=1):
        try:
            step = parse_json(line)["step"]
            if not isinstance(step, int) or isinstance(step, bool) or step <= last:
                raise ValueError(f"step is {step!r}, required is an integer above {last}")
        except (ValueError, TypeError, KeyError) as error:
            if not line.endswith(b"\n") and line[: len(LOG_BEGINS)] == LOG_BEGINS[: len(line)]:
                break
            raise CorruptFileError(
                f"line {number} of {path} is not the next step of a training ({error}): "
                f"{line[:60].decode(errors='replace')!r}; take the line out, and resume"
            ) from error
        last = step
        if step < num_steps:
            kept.append(line.decode().rstrip("\n") + "\n")
    write_text(path, "".join(kept))


def last_log_row(path: Path) -> dict[str, Any] | None:
    """Return the last whole step of a log, None where there is none."""
    if not path.exists():
        return None
    for line in reversed(read_whole(path).decode(errors="replace").splitlines()):
        with contextlib.suppress(ValueError, TypeError):
            row: dict[str, Any] = dict(parse_json(line))
            if "step" in row:
                return row
    return None


def sources_of_run(folder: str | Path) -> dict[str, str] | None:
    """Return the SHA-256 of the files that a run was started on, None where an earlier version did not note them.

    Raises:
        TransformerFamError: as `recipe_of_run`.
    """
    sources = _read_recipe(folder).get(SOURCES)
    return None if sources is None else dict(sources)


def recipe_of_run(folder: str | Path) -> Recipe:
    """Return the recipe that a folder was trained with.

    Raises:
        TransformerFamError: the folder holds no run.
        CorruptFileError: its recipe is cut, or of something else.
    """
    path = Path(folder) / RECIPE_FILE
    try:
        values = {name: value for name, value in _read_recipe(folder).items() if name != SOURCES}
        return build_recipe(without_removed(values))
    except RecipeError as error:
        raise CorruptFileError(
            f"{path} is not a recipe of this package: {error}; restore it, or train again"
        ) from error


def _read_recipe(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / RECIPE_FILE
    try:
        values = parse_json(read_whole(path))
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise TransformerFamError(f"{folder} holds no training run: {path.name} {why}; give its folder") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise CorruptFileError(
            f"{path} is cut or damaged ({error}); put it back, or train into another folder"
        ) from error
    if not isinstance(values, dict) or not _are_texts(values.get(SOURCES, {})):
        raise CorruptFileError(
            f"{path} is not a recipe of this package: it is {str(values)[:60]!r}; restore it, or retrain"
        )
    return values


def _are_texts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
