"""What a study is made with; a study that is resumed has the same."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformerfam.fields import require_field, require_types

LEAST_PIECE = 16
"""Tokens of a piece at least."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a study. Lengths are in tokens.

    Raises:
        TransformerFamError: one is out of its range.
    """

    piece_tokens: int = 128
    """Tokens of a piece that the teacher has in its window."""
    answer_tokens: int = 48
    """Tokens of a continuation, or of a question with its answer, at most."""
    pieces_per_step: int = 4
    """Pieces that a lesson is about; a step learns from one lesson."""
    pool: int = 8
    """Lessons that are learned from in turn before others are made."""
    uses: int = 4
    """How often each of them is."""
    temperature: float = 0.4
    """With which continuations, questions and answers are drawn."""
    lr: float = 0.02
    """Of Adam, as a share of a row's own size; it is reached after `warmup_steps`."""
    warmup_steps: int = 10
    """Steps in which the learning rate rises."""
    evaluate_every: int = 10
    """Steps from one look at the held-out lessons to the next."""
    num_held_out: int = 4
    """Held-out lessons."""
    patience: int = 8
    """Looks at the held-out lessons without a new best one, after which a study ends."""
    hide_memory: bool = False
    """Hide the initial memory from the teacher: for a model whose memory was never trained."""
    seed: int = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        require_types(self)
        for name, least in (("piece_tokens", LEAST_PIECE), ("answer_tokens", 1), ("num_held_out", 1), ("seed", 0)):
            require_field(self, name, getattr(self, name) >= least, f"at least {least}")
        for name in ("pieces_per_step", "pool", "uses", "warmup_steps", "evaluate_every", "patience"):
            require_field(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("temperature", "lr"):
            require_field(self, name, 0 < getattr(self, name) <= 10, "above 0 and at most 10")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    def lesson_number(self, step: int) -> int:
        """Return which lesson a step learns from."""
        return step // (self.pool * self.uses) * self.pool + step % self.pool
