"""What is wrong with plain values, in one line: pydantic's errors as those of this package."""

import difflib
import typing
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from transformerfam.errors import RecipeError
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.tasks.ranges import OUT_OF_RANGE, range_of
from transformerfam.training.recipe.removed import REMOVED

FORMS = {
    "int_type": "a value of type int",
    "float_type": "a value of type float",
    "string_type": "a value of type str",
    "bool_type": "a value of type bool",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section with keys",
}
"""What an error's type says of the value that is required."""
BOUNDS = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
"""The bound that an error's type is about."""
MOST_IMPORTANT = ("extra_forbidden", "missing")
"""Types of the errors that are reported before all others: a misspelt key is most often a missing one, too."""

Place = tuple[int | str, ...]


def recipe_error(section: type[BaseModel], values: Any, error: ValidationError, where: str = "") -> RecipeError:
    """Return the error that names the key, its value, and what is required.

    Args:
        section: what was to be built.
        values: from these plain values.
        error: what pydantic found; the first error, or the first unknown key, is reported.
        where: name of the section in the recipe; empty is the recipe itself.
    """

    def rank(found: ErrorDetails) -> int:
        kind = found["type"]
        return MOST_IMPORTANT.index(kind) if kind in MOST_IMPORTANT else len(MOST_IMPORTANT)

    found = min(error.errors(include_url=False), key=rank)
    place, kind = found["loc"], found["type"]
    if kind == "extra_forbidden":
        known = _section_at(section, place[:-1]).model_fields
        return unknown_key(_join(place[:-1], where), str(place[-1]), known)
    if kind == "missing" and isinstance(place[-1], str):
        return RecipeError(f"missing key {_join(place, where)} in the recipe; add it")
    if kind == "value_error":
        return RecipeError(str(found["ctx"]["error"]))
    value, required = found["input"], _required(section, found)
    if place and isinstance(place[-1], int) and kind != "model_type":  # a number or a text in a list
        place, value = place[:-1], _value_at(values, place[:-1])
        required += "" if kind == "missing" else " for each"
    value = list(value) if isinstance(value, tuple) else value
    return RecipeError(f"{_join(place, where) or 'recipe'} is {value!r}, required is {required}; change it")


def unknown_key(where: str, name: str, known: Iterable[str]) -> RecipeError:
    """Return the error about a key that a section does not have, with the nearest one that it has."""
    dotted, known = f"{where}.{name}" if where else name, list(known)
    if dotted in REMOVED:
        return RecipeError(f"key {dotted} of the recipe was removed: {REMOVED[dotted].remedy}")
    nearest = difflib.get_close_matches(name, known, n=1)
    near = f"{where}.{nearest[0]}" if where and nearest else "".join(nearest)
    hint = f"did you mean {near}?" if nearest else f"known keys are {', '.join(known)}"
    return RecipeError(f"unknown key {dotted} in the recipe; {hint}")


def _required(section: type[BaseModel], found: ErrorDetails) -> str:
    """Say what an error requires of the value."""
    place, kind, context = found["loc"], found["type"], found.get("ctx", {})
    if kind == OUT_OF_RANGE:
        return str(context["required"])
    if kind in ("missing", "too_long"):
        names = [part for part in place if isinstance(part, str)]
        return f"a list of {_length_of_list(_field_at(section, place[: place.index(names[-1]) + 1]))} values"
    if kind in FORMS:
        return FORMS[kind]
    if kind == "literal_error":
        return f"one of {', '.join(_literals(_field_at(section, place).annotation))}"
    if kind in BOUNDS and abs(context[BOUNDS[kind]]) == LARGEST_INTEGER:
        return "an integer below 2^63"
    if kind in BOUNDS or kind == "finite_number":
        return range_of(_field_at(section, place)) or "a finite number"
    return f"another value ({found['msg']})"


def _section_at(section: type[BaseModel], place: Place) -> type[BaseModel]:
    """Return the class of the section that a place leads to."""
    for name in place:
        if isinstance(name, str):
            section = next(part for part in _parts(section.model_fields[name].annotation) if _is_section(part))
    return section


def _field_at(section: type[BaseModel], place: Place) -> FieldInfo:
    names = [name for name in place if isinstance(name, str)]
    return _section_at(section, tuple(names[:-1])).model_fields[names[-1]]


def _length_of_list(field: FieldInfo) -> int:
    return next(len(typing.get_args(part)) for part in _parts(field.annotation) if typing.get_origin(part) is tuple)


def _literals(annotation: Any) -> list[str]:
    return [
        str(one) for part in _parts(annotation) if typing.get_origin(part) is Literal for one in typing.get_args(part)
    ]


def _parts(annotation: Any) -> Iterable[Any]:
    """Yield an annotation and what it is made of."""
    yield annotation
    for argument in typing.get_args(annotation):
        yield from _parts(argument)


def _is_section(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _value_at(values: Any, place: Place) -> Any:
    for part in place:
        values = getattr(values, str(part)) if isinstance(values, BaseModel) else values[part]
    return values


def _join(place: Place, where: str) -> str:
    return ".".join(str(part) for part in ((where, *place) if where else place))
