"""The folder of a run: one run, one writer, one recipe."""

import json
import warnings
from fnmatch import fnmatch
from pathlib import Path

from filelock import BaseFileLock

from transformerfam.errors import CorruptFileError, RecipeError, TransformerFamError
from transformerfam.files.locks import hold
from transformerfam.files.tensors import is_ours
from transformerfam.files.writing import make_folder, require_regular, write_text
from transformerfam.training.checkpoint import RECIPE_FILE, SOURCES, recipe_of_run, sources_of_run
from transformerfam.training.data.sources import require_same_sources, sources_of
from transformerfam.training.ranks import Ranks
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.weights.folders import BEST_FILE, BEST_KIND, CHECKPOINT_FILE, CONFIG_FILE
from transformerfam.weights.memories import MEMORY_FILES
from transformerfam.weights.peft_adapters import LORA_CONFIG_FILE, LORA_FILE

LOG_FILE = "log.jsonl"
LOCK_FILE = "run.lock"
WRITTEN = (
    *(
        LOG_FILE,
        "checkpoint*.safetensors",
        BEST_FILE,
        *MEMORY_FILES,
        "adapter_*",
        "*config.json",
        "model*.safetensors*",
    ),
    *("pytorch_model*", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*"),
)
"""Files that a run, or the model at its end, replaces."""

KINDS = {CHECKPOINT_FILE: "checkpoint"} | MEMORY_FILES
"""Files of which one at least is in the folder of a run that has got anywhere, and what is in each."""

FREE_TO_CHANGE = ("max_seconds", "checkpoint_seconds", "threads")
"""Of a recipe's schedule, what changes no number of the run."""


def claim_folder(
    folder: Path, recipe: Recipe, resume: bool, ranks: Ranks, overwrite: bool = False
) -> BaseFileLock | None:
    """Make the folder of a run, hold it, and write its recipe there, unless it may replace an earlier run.

    That run is kept until `begin_run`, since the new one may fail while it is built.

    Args:
        folder: where to.
        recipe: of the run.
        resume: whether a run that is there continues.
        ranks: the processes of the run; the first one holds the folder.
        overwrite: start over and replace a run that is there.

    Returns:
        The lock, which is held, of the first process.

    Raises:
        RecipeError: the folder holds a run already and `resume` is False, or another recipe's and it is True.
        CorruptFileError: `resume` is True and there is no checkpoint.
        TransformerFamError: another process trains there, or the folder is that of something else, as of what the run
            starts from.
    """
    if resume and not (folder / CHECKPOINT_FILE).exists():
        raise CorruptFileError(
            f"{folder / CHECKPOINT_FILE} does not exist: no run was there, or it ended before its first checkpoint; "
            "run the same command without --resume, which starts over"
        )
    _require_no_input(folder, recipe)
    make_folder(folder)
    for name in (LOG_FILE, RECIPE_FILE, LOCK_FILE):
        require_regular(folder / name)
    _require_right(folder, recipe, resume, overwrite)  # before a lock is put there
    lock = hold(folder / LOCK_FILE, f"the run in {folder}") if ranks.is_main else None
    try:
        _require_right(folder, recipe, resume, overwrite)  # it may have changed while another process ended
    except TransformerFamError:
        release(lock)
        raise
    ranks.wait()
    if ranks.is_main:
        if resume:
            save_recipe(folder, recipe)
        elif not overwrite:
            begin_run(folder, recipe)
    return lock


def begin_run(folder: Path, recipe: Recipe) -> None:
    """Remove what an earlier run left, and write the recipe."""
    _clear(folder)
    save_recipe(folder, recipe)


def save_recipe(folder: Path, recipe: Recipe) -> None:
    """Write what `recipe_of_run` and `sources_of_run` read."""
    values = recipe.to_dict() | {SOURCES: sources_of(recipe)}
    write_text(folder / RECIPE_FILE, json.dumps(values, indent=2) + "\n")


def release(lock: BaseFileLock | None) -> None:
    """Release a folder."""
    if lock is not None:
        lock.release()


def require_same_run(folder: Path, recipe: Recipe, may_differ: tuple[str, ...] = FREE_TO_CHANGE) -> None:
    """Refuse to resume a run with a recipe that is not its own, or with other files.

    Args:
        folder: of the run.
        recipe: to continue by.
        may_differ: fields of the schedule that need not agree.

    Raises:
        RecipeError: the recipes or the files that they name differ, or the run's recipe is missing; the message names
            the first difference.

    Warns:
        UserWarning: an earlier version started the run, and did not note its files.
    """
    if not (folder / RECIPE_FILE).exists():
        raise RecipeError(
            f"{folder} holds a run without its {RECIPE_FILE}, so it is unknown whether it is of this recipe; put "
            "that file back, or train into another folder"
        )
    before, now = recipe_of_run(folder).to_dict(), recipe.to_dict()
    for section, values in now.items():
        there, here = _fields(before[section], section), _fields(values, section)
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name) and not (section == "schedule" and name in may_differ):
                raise RecipeError(
                    f"{folder} was trained with another recipe: section {section} differs, {name} is "
                    f"{there.get(name)!r} there and {here.get(name)!r} here; resume with the same recipe and the same "
                    "--set, or train into another folder"
                )
    sources = sources_of_run(folder)
    if sources is not None:
        require_same_sources(sources, recipe, f"the run in {folder}")
    elif names := list(sources_of(recipe)):
        warnings.warn(
            f"an earlier version started the run in {folder}, and did not note its files; it is not checked whether "
            f"{', '.join(names[:3])} and the like are what they were",
            stacklevel=2,
        )


def _fields(values: object, section: str) -> dict[str, object]:
    return values if isinstance(values, dict) else {section: values}


def _require_no_input(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder whose model or memory the run starts from: both would be lost.

    Raises:
        RecipeError: it is one.
    """
    for name in ("base", "memory"):
        start = getattr(recipe.model, name)
        if start is not None and Path(start).is_dir() and Path(start).resolve() == folder.resolve():
            raise RecipeError(
                f"{folder} is model.{name}, which the run starts from and would replace; train into another folder"
            )


def _require_right(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    if resume:
        require_same_run(folder, recipe, (*FREE_TO_CHANGE, "steps"))
    else:
        _require_free(folder, overwrite)


def _require_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with a run, or with files of something else that a run would overwrite.

    Raises:
        RecipeError: it holds a run, which is not to be overwritten.
        TransformerFamError: it holds something else.
    """
    names = {path.name for path in folder.iterdir()}
    written = [name for name, kind in KINDS.items() if is_ours(folder / name, kind)]
    if RECIPE_FILE in names:
        recipe_of_run(folder)  # that it is a recipe at all
        if written and not overwrite:
            raise RecipeError(
                f"{folder} holds a run already; continue it by --resume, start over by --overwrite, or train into "
                "another folder"
            )
        names -= {LOG_FILE, *([BEST_FILE] if is_ours(folder / BEST_FILE, BEST_KIND) else [])}
    elif CHECKPOINT_FILE in written:
        raise RecipeError(f"{folder} holds a run already, without its {RECIPE_FILE}; train into another folder")
    foreign = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in WRITTEN))
    was_run = {RECIPE_FILE, LOCK_FILE} <= names  # and ended before its first checkpoint
    if foreign and was_run and not (written or overwrite):
        raise TransformerFamError(
            f"{folder} holds {foreign[0]}, which is of no run that can continue and would be lost; start over by "
            "--overwrite, or train into a new folder"
        )
    if foreign and not was_run and not (written and RECIPE_FILE in names):
        raise TransformerFamError(
            f"{folder} holds {foreign[0]}, which is of no training run and would be lost; train into a new folder"
        )


def _clear(folder: Path) -> None:
    """Remove what an earlier run left: one that was killed before its first checkpoint, or is to be overwritten."""
    for name in (LOG_FILE, CHECKPOINT_FILE, BEST_FILE, *MEMORY_FILES, CONFIG_FILE, LORA_FILE, LORA_CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*-of-*.safetensors"):
        path.unlink()
