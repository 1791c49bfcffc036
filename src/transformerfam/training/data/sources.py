"""The files that a run reads, identified by their content: with others a resumed run would be another one."""

import hashlib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from transformerfam.errors import RecipeError
from transformerfam.tasks.novels import HELD_OUT_NOVELS
from transformerfam.tasks.text import files_of
from transformerfam.training.recipe.recipe import Recipe

MODEL_FILES = (
    *("config.json", "model*.safetensors*", "pytorch_model*", "fam.safetensors", "adapter_model.safetensors"),
    *("adapter_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*"),
)
"""Files of a folder that make a model, its memory and its tokenizer."""


def sources_of(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of every file that a recipe names, by the key that names it.

    Of a folder every file counts that is read; what is not there is left out, as are models and novels of packages.

    Args:
        recipe: the recipe.

    Raises:
        RecipeError: a file cannot be read.
    """
    return {name: _digest(path) for name, path in _files(recipe) if path.is_file()}


def require_same_sources(there: dict[str, str], recipe: Recipe, what: str) -> None:
    """Refuse a recipe whose files are not what they were.

    Args:
        there: what `sources_of` returned before.
        recipe: to resume with.
        what: name of the run, for the message.

    Raises:
        RecipeError: a file was changed, removed or added; the message names it.
    """
    here = sources_of(recipe)
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            change = "was changed" if name in there and name in here else "is missing" if name in there else "is new"
            known = [
                f"{digests[name][:12]} {where}"
                for digests, where in ((there, "there"), (here, "here"))
                if name in digests
            ]
            raise RecipeError(
                f"{what} read other files than there are now: {name} {change} (SHA-256 {', '.join(known)}); put back "
                "what it was, or train into another folder"
            )


def _files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    data = recipe.data
    texts = {f"data.{key}": getattr(data, key) for key in data.text_keys}
    texts["model.vocabulary_from"] = recipe.model.vocabulary_from
    for key, name in texts.items():
        if name not in (None, "sentences", *HELD_OUT_NOVELS):
            yield key, Path(str(name))
    of_data = {f"data.{key}": getattr(data, key) for key in data.file_keys}
    for key, names_of_files in (recipe.text_files | of_data).items():
        yield from ((f"{key}.{number}", path) for number, path in enumerate(files_of(names_of_files, key)))
    if recipe.evaluation is not None and recipe.evaluation.questions is not None:
        yield "evaluation.questions", Path(recipe.evaluation.questions)
    folders: dict[str, tuple[str, ...]] = {f"data.{key}": ("*.txt",) for key in data.folder_keys}
    folders |= {"model.base": MODEL_FILES, "model.memory": MODEL_FILES}
    names = {f"data.{key}": getattr(data, key) for key in data.folder_keys}
    names |= {"model.base": recipe.model.base, "model.memory": recipe.model.memory}
    for key, patterns in folders.items():
        folder = Path(names[key] or "")
        if names[key] and folder.is_dir():
            yield from (
                (f"{key}/{path.name}", path)
                for path in sorted(folder.iterdir())
                if any(fnmatch(path.name, pattern) for pattern in patterns)
            )


def _digest(path: Path) -> str:
    try:
        status = path.stat()
        return _digest_of_version(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise RecipeError(f"cannot read {path} ({error.strerror}); check the file, or name another") from error


@lru_cache(maxsize=4096)
def _digest_of_version(path: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file, which is read once as long as its size and time stay."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
