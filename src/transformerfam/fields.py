"""The fields of a configuration: their names, types and ranges."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from transformerfam.errors import TransformerFamError

LARGEST_INTEGER = 2**63 - 1
"""What torch takes for a number of tokens, a size or a seed."""

LARGEST_FLOAT = 3.4e38
"""What float32 holds."""


def require_field(config: Any, name: str, holds: bool, required: str) -> None:
    """Refuse a field of a configuration.

    Raises:
        TransformerFamError: `holds` is False; the message names the field, its value, and what is required.
    """
    if not holds:
        raise TransformerFamError(f"{name} is {getattr(config, name)!r}, required is {required}; change {name}")


def require_types(config: Any) -> None:
    """Refuse fields of a configuration whose values are not of the type that they are annotated with.

    A number may be an integer where a float is meant, and is finite. Flags are no numbers.

    Raises:
        TransformerFamError: the message names the field, its value, and the type required.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        require_field(config, field.name, _is_of_type(getattr(config, field.name), kind), _name_of_type(kind))


def _is_of_type(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of_type(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of_type(one, arguments[0]) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    return isinstance(value, kind)


def _name_of_type(kind: Any) -> str:
    """Return a type's name for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_name_of_type(one) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a tuple, each {_name_of_type(arguments[0])}"
    return {int: "an integer below 2^63", float: "a finite number", bool: "True or False", type(None): "None"}[kind]


def whole_numbers(text: str, name: str) -> list[int]:
    """Return the numbers of an option that takes one or more, with commas between them.

    Args:
        text: what was given.
        name: the option's, for the message.

    Raises:
        TransformerFamError: a part is no whole number from 0 to `LARGEST_INTEGER`.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) <= LARGEST_INTEGER)]
    if wrong:
        raise TransformerFamError(
            f"{name} has {wrong[0]!r}, required are whole numbers from 0 to 2^63 - 1, for example 512,1024"
        )
    return [int(part) for part in parts]


def values_to_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values, once all of them are fields of the configuration `cls`.

    Raises:
        TransformerFamError: one is not; the message has the nearest field.
    """
    if not isinstance(values, Mapping):
        raise TransformerFamError(f"{cls.__name__} is {values!r}, required are its fields by name")
    known = list(inspect.signature(cls).parameters)
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; known fields are {', '.join(known)}"
            raise TransformerFamError(f"{cls.__name__} has no field {name!r}{hint}")
    return values
