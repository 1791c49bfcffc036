"""The types of a recipe's values, with their ranges, and how a message says a range."""

import typing
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from transformerfam.fields import LARGEST_FLOAT, LARGEST_INTEGER

OUT_OF_RANGE = "out_of_range"
"""Type of the errors of this module; their context holds what is required."""


def _in_order(least: int, limits: tuple[int, int]) -> tuple[int, int]:
    if not least <= limits[0] <= limits[1]:
        raise PydanticCustomError(OUT_OF_RANGE, "required is {required}", {"required": f"{least} <= low <= high"})
    return limits


Integer = Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Natural = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Count = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]

Number = Annotated[float, Field(ge=-LARGEST_FLOAT, le=LARGEST_FLOAT, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=LARGEST_FLOAT, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

# Strict but for lists, which TOML and JSON have in place of tuples.
Integers = Annotated[tuple[Integer, ...], Strict(False)]
Texts = Annotated[tuple[str, ...], Strict(False)]
Decays = Annotated[tuple[Decay, Decay], Strict(False)]
Pair = Annotated[tuple[Integer, Integer], Strict(False)]
Limits = Annotated[Pair, AfterValidator(partial(_in_order, 0))]
LimitsFrom1 = Annotated[Pair, AfterValidator(partial(_in_order, 1))]
LimitsFrom8 = Annotated[Pair, AfterValidator(partial(_in_order, 8))]

NAMES_OF_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def range_of(field: FieldInfo) -> str | None:
    """Return the range of a field's numbers in words, None where every finite number will do."""
    found: dict[str, float] = {}
    for item in (*field.metadata, *_metadata(field.annotation)):
        found |= {name: value for name in NAMES_OF_BOUNDS if (value := getattr(item, name, None)) is not None}
    return range_in_words(found)


def range_in_words(bounds: Mapping[str, float]) -> str | None:
    """Say bounds, by the names of `NAMES_OF_BOUNDS`; those that every number has do not count."""
    known = {name: value for name, value in bounds.items() if abs(value) not in (LARGEST_INTEGER, LARGEST_FLOAT)}
    if known.keys() == {"ge", "le"}:
        return f"{known['ge']:g} to {known['le']:g}"
    return (
        " and ".join(form.format(f"{known[name]:g}") for name, form in NAMES_OF_BOUNDS.items() if name in known) or None
    )


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield what an annotation has besides its types."""
    for item in getattr(annotation, "__metadata__", ()):
        yield from getattr(item, "metadata", [item])
    for argument in typing.get_args(annotation):
        yield from _metadata(argument)
