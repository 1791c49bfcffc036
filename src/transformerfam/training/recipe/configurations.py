"""The sections of a recipe that are a system's own configuration, which checks its fields itself."""

import dataclasses
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator

from transformerfam.config import FamConfig
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.rivals import RivalConfig
from transformerfam.training.recipe.messages import unknown_key

OPEN_MEMORY = {"fam_key_bias": 0.0}
"""Training begins with an open memory; the section `key_bias` may close it at first."""


def _built(kind: type[FamConfig | RivalConfig], where: str, defaults: dict[str, Any], values: Any) -> Any:
    """Return the configuration of a system from plain values; it checks them itself."""
    if isinstance(values, kind):
        return values
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is {values!r}, required is a section with keys; change it")
    known = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise unknown_key(where, name, known)
    try:
        return kind.from_dict(defaults | values)
    except TransformerFamError as error:
        raise RecipeError(f"{where}: {error}") from error


FamSection = Annotated[FamConfig, BeforeValidator(partial(_built, FamConfig, "fam", OPEN_MEMORY))]
RivalSection = Annotated[RivalConfig, BeforeValidator(partial(_built, RivalConfig, "rival", {}))]
