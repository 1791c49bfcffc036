"""Recipes as TOML files and plain values: nothing that a recipe does not know is let through."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformerfam.config import FamConfig
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.files import parse_toml, read_whole
from transformerfam.training.recipe.recipe import Recipe


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
        raise RecipeError(f"{path} is no valid TOML: {error}; correct the file") from error
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
    return build_dataclass(Recipe, values, "")


def build_dataclass(cls: type, values: Any, where: str) -> Any:
    """Build a section, and the sections in it, from plain values.

    Args:
        cls: its dataclass.
        values: plain values.
        where: its name, for messages.

    Raises:
        RecipeError: as `build_recipe`.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{where or 'recipe'} is {values!r}, required is a section with keys")
    if cls is FamConfig:  # training begins with an open memory; the key_bias section may close it at first
        values = {"fam_key_bias": 0.0} | values
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {_join(where, nearest[0])}?" if nearest else f"known keys are {', '.join(fields)}"
            raise RecipeError(f"unknown key {_join(where, name)} in the recipe; {hint}")
    hints = typing.get_type_hints(cls)
    for name, known in fields.items():
        if name not in values and known.default is known.default_factory is dataclasses.MISSING:
            raise RecipeError(f"missing key {_join(where, name)} in the recipe; add it")
    built = {name: _convert(hints[name], value, _join(where, name)) for name, value in values.items()}
    try:
        return cls(**built)
    except RecipeError:
        raise
    except TransformerFamError as error:
        raise RecipeError(f"{where}: {error}") from error


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Check a plain value against an annotation and return it as that type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return build_dataclass(typing.cast(type, kind), value, where)
    if kind is Any:
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is {value!r}, required is a section")
        return {name: _convert(arguments[1], item, _join(where, name)) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} is {value!r}, required is a list")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise RecipeError(f"{where} is {value!r}, required is a list of {len(arguments)} values")
        return tuple(_convert(a, item, where) for a, item in zip(arguments, value, strict=True))
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where} is {value!r}, required is one of {', '.join(map(str, arguments))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"{where} is {value!r}, required is a value of type {kind.__name__}")
    return value
