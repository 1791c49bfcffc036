"""The stages of a run: which one it is in, and when the next one is due."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from transformerfam.training.recipe.sections import Stage


class Curriculum:
    """Where a run is in its curriculum.

    Args:
        stages: of the recipe, in order; a recipe without any has one that never ends.

    Attributes:
        stage_idx: the stage at hand, from 0.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages) or (Stage(filler_tokens=(0, 0)),)
        self.stage_idx = 0
        self._num_steps = 0  # of this stage
        self._accuracies: deque[float] = deque(maxlen=self.stages[0].window)  # of its last steps

    def advance(self, key_accuracy: float | None) -> None:
        """Count a step, and begin the next stage when it is due.

        Args:
            key_accuracy: of the step; None without a question.
        """
        self._num_steps += 1
        if key_accuracy is not None:
            self._accuracies.append(key_accuracy)
        stage, accuracies = self.stages[self.stage_idx], self._accuracies
        is_solved = (
            stage.advance_accuracy is not None
            and len(accuracies) == accuracies.maxlen
            and sum(accuracies) / len(accuracies) >= stage.advance_accuracy
        )
        is_last = self.stage_idx == len(self.stages) - 1
        if not is_last and (is_solved or (stage.max_steps is not None and self._num_steps >= stage.max_steps)):
            self._begin(self.stage_idx + 1)

    def _begin(self, stage_idx: int, num_steps: int = 0, accuracies: Sequence[float] = ()) -> None:
        self.stage_idx, self._num_steps = stage_idx, num_steps
        self._accuracies = deque(accuracies, maxlen=self.stages[stage_idx].window)

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as plain JSON values."""
        accuracies = list(self._accuracies)
        return {"stage_idx": self.stage_idx, "steps_in_stage": self._num_steps, "accuracies": accuracies}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from what `to_dict` returned."""
        self._begin(values["stage_idx"], values["steps_in_stage"], values["accuracies"])
