"""Folders of memories and models: the names of their files, and what may be written into which."""

import os
from pathlib import Path

from transformerfam.errors import TransformerFamError
from transformerfam.files.tensors import is_ours

FAM_FILE = "fam.safetensors"
CONFIG_FILE = "config.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
BEST_FILE, BEST_KIND = "best.safetensors", "best weights"
RUN_FILES = {"recipe.json", CHECKPOINT_FILE, BEST_FILE}
"""What a folder holds next to its memory where a run of training made it."""


def require_own_folder(folder: str | os.PathLike[str], is_model: bool, overwrite: bool, remedy: str = "") -> None:
    """Refuse a folder that would lose something to a memory, or to a model with its memory.

    Args:
        folder: where to; there may be none yet.
        is_model: whether the weights of the base model go there, too.
        overwrite: replace what this package wrote there, if it is of the same kind.
        remedy: how a user gets that, for the message.

    Raises:
        TransformerFamError: the folder holds something else, or the same and it is not to be overwritten.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise TransformerFamError(f"could not write to {folder}: it is a file, required is a folder; choose another")
    names = {path.name for path in folder.iterdir()}
    kind = "a model with its memory" if is_model else "a memory"
    is_same = is_ours(folder / FAM_FILE, "adapter") and (CONFIG_FILE in names) == is_model and not names & RUN_FILES
    if names and not is_same:
        raise TransformerFamError(
            f"could not write {kind} to {folder}: it holds other files, for example {min(names)}; choose a new or "
            "empty folder"
        )
    if names and not overwrite:
        raise TransformerFamError(f"{folder} holds {kind} already; {remedy}choose another folder")
