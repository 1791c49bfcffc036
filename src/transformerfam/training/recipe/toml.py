"""Recipes as TOML files and plain values: nothing that a recipe does not know is let through."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from transformerfam.errors import RecipeError
from transformerfam.files.reading import parse_toml, read_whole
from transformerfam.tasks.section import Section
from transformerfam.training.recipe.messages import recipe_error
from transformerfam.training.recipe.recipe import Recipe

Built = TypeVar("Built", bound=Section)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a TOML file.
        overrides: each `section.key=value`; the value is TOML, or a plain word.

    Raises:
        RecipeError: the file cannot be read, is no TOML, or has an unknown, missing or wrong key.
    """
    try:
        values = parse_toml(read_whole(path))
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {error.strerror}; give the path of a TOML file"
        ) from error
    except ValueError as error:  # TOML syntax and UTF-8
        raise RecipeError(f"{path} is not valid TOML: {error}; correct the file") from error
    for override in overrides:
        apply_override(values, override)
    return build_recipe(values)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the values of a recipe.

    Raises:
        RecipeError: there is no "=", or the key runs through something that is no section.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    set_value(values, dotted.strip(), value)


def set_value(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `section.key` in plain values; sections that are missing are made.

    Raises:
        RecipeError: the key runs through something that is no section.
    """
    *sections, name = dotted.split(".")
    place: Any = values
    for section in sections:
        place = place[_index(place, section, dotted)] if isinstance(place, list) else place.setdefault(section, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"override {dotted!r} goes into {section}, which is a value and no section")
    place[_index(place, name, dotted) if isinstance(place, list) else name] = value


def _index(items: list[Any], text: str, dotted: str) -> int:
    """Return the index in a list that an override names.

    Raises:
        RecipeError: it is no index of the list.
    """
    if not (text.isascii() and text.isdigit() and int(text) < len(items)):
        raise RecipeError(
            f"override {dotted!r} has {text!r} for a list of {len(items)}, required is 0 to the last of them"
        )
    return int(text)


def parse_overrides(overrides: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of overrides, each `key=value`."""
    values: dict[str, Any] = {}
    for override in overrides or ():
        apply_override(values, override)
    return values


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: an unknown, missing or wrong key; the message names it, and the nearest known one.
    """
    return build_section(Recipe, values)


def build_section(section: type[Built], values: Any) -> Built:
    """Build a section, and the sections in it, from plain values.

    Raises:
        RecipeError: as `build_recipe`.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise recipe_error(section, values, error) from error
