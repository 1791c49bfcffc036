"""Errors that a user can meet; each is a `ValueError`, so one `except` catches them all."""

from typing import Any


class TransformerFamError(ValueError):
    """Base class of every error that this package raises for a user's input."""


class UnsupportedModelError(TransformerFamError):
    """The model cannot be converted; the message names the part that does not fit.

    Attributes:
        reason: what does not fit, without what the message says of installed versions.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


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


class UnsupportedVersionError(TransformerFamError):
    """torch, transformers or PEFT is too old; the message gives the version required and the install command."""


class ReadInterrupted(KeyboardInterrupt):
    """Ctrl-C while reading; `state` holds what was read, and the message says how to resume.

    Attributes:
        state: the `FamState` after the last whole piece.
        num_tokens_done: tokens of this call that the state holds.
    """

    def __init__(self, state: Any, num_tokens_done: int, of_iterator: bool = False) -> None:
        rest = "an iterator of the ids after them" if of_iterator else f"input_ids[..., {num_tokens_done}:]"
        super().__init__(
            f"interrupted after {num_tokens_done} tokens; resume with model.read({rest}, state) and the `state` of "
            "this exception"
        )
        self.state = state
        self.num_tokens_done = num_tokens_done
