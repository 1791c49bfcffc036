"""The base class of a recipe's sections."""

from pydantic import BaseModel, ConfigDict

from transformerfam.errors import RecipeError


class Section(BaseModel):
    """Fields of one type each, which stay as they are; others are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def require(holds: bool, message: str) -> None:
    """Refuse a recipe.

    Raises:
        RecipeError: `holds` is False.
    """
    if not holds:
        raise RecipeError(message)
