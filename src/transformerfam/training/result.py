"""How a training run ended."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    folder: Path
    steps: int
    """Steps that were done, all runs together."""
    seconds: float
    is_complete: bool
    """False when it was interrupted; a checkpoint is there, and no memory yet."""
    message: str
    """What to tell the user."""
