"""Errors that a user can meet; each is a `ValueError`, so one `except` catches them all."""


class TransformerFamError(ValueError):
    """Base class of every error that this package raises for a user's input."""


class UnsupportedModelError(TransformerFamError):
    """The model cannot be converted; the message names the part that does not fit."""


class StateMismatchError(TransformerFamError):
    """A state or an adapter belongs to another model, configuration, batch or version."""


class CorruptFileError(TransformerFamError):
    """A state, adapter or checkpoint file is truncated, foreign or damaged."""


class RecipeError(TransformerFamError):
    """A recipe has an unknown key, a missing key or a value out of range."""


class NonFiniteLossError(TransformerFamError):
    """Training met a loss that is not finite; the message names the block and layer where it began."""


class MissingPackageError(TransformerFamError):
    """An optional package is not installed; the message gives the install command."""
