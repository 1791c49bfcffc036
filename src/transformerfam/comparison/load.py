"""Comparisons read from their files, each as the class of its task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformerfam.comparison.plan import Comparison
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.files.reading import parse_toml, read_whole
from transformerfam.tasks.registry import ON_TEXTS, comparison_classes
from transformerfam.training.recipe.toml import apply_override, build_section


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison.

    Args:
        path: a TOML file with the fields of `Comparison` and of its task; `recipe` is a path relative to it, or
            its values.
        overrides: each `key=value`, or `recipe.section.key=value`.

    Raises:
        RecipeError: the file cannot be read, is no TOML, or has an unknown, missing or wrong key.
    """
    path = Path(path)
    values = _read_toml(path)
    if isinstance(values.get("recipe"), str):
        values["recipe"] = _read_toml(path.parent / values["recipe"])
    for override in overrides:
        apply_override(values, override)
    values.setdefault("name", path.stem)
    try:
        comparison = build_section(_class_of(values), values)
        for run in comparison.runs:
            recipe = comparison.recipe_of(run)
            if recipe.instructions is not None and "task" not in values:
                raise RecipeError(
                    "the recipe trains on [instructions] and the comparison names no task, so it would be evaluated on "
                    f"passkeys, which it was not trained on; set task to one of {', '.join(comparison_classes())}"
                )
            if recipe.instructions is None and comparison.task in ON_TEXTS:
                raise RecipeError(
                    f"task is {comparison.task!r}, and the recipe trains on {recipe.data.task!r} "
                    "(data.task), which does not teach it; give the recipe a section [instructions] with files"
                )
            trained_by = (comparison.task, *comparison.also_trained_by)
            if recipe.instructions is None and recipe.data.task not in trained_by:
                raise RecipeError(
                    f"the recipe trains on {recipe.data.task!r} (data.task), and the comparison asks for "
                    f"{comparison.task!r}, which that does not teach; set data.task of the recipe to "
                    f"{' or '.join(map(repr, trained_by))}, or task of the comparison"
                )
    except RecipeError:
        raise
    except TransformerFamError as error:
        raise RecipeError(f"{path}: {error}") from error
    return comparison


def _class_of(values: dict[str, Any]) -> type[Comparison]:
    """Return the class of a comparison's task.

    Raises:
        RecipeError: there is no such task, or a key is one of another task alone.
    """
    task, kinds = values.get("task", "passkey"), comparison_classes()
    if not isinstance(task, str) or task not in kinds:
        raise RecipeError(f"task is {task!r}, required is one of {', '.join(kinds)}; change it")
    for name in values.keys() - kinds[task].model_fields.keys():
        others = [other for other, kind in kinds.items() if name in kind.model_fields]
        if others:
            raise RecipeError(f"{name} is a key of task {others[0]!r}, and task is {task!r}; leave one of them out")
    return kinds[task]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(read_whole(path))
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}; give the path of a TOML file") from error
    except ValueError as error:
        raise RecipeError(f"{path} is no valid TOML: {error}; correct the file") from error
