"""Callbacks and trackers of transformers' Trainer on this package's training: TensorBoard, MLflow, a user's own."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.training.trainer import Trainer


class TrainerCallbacks:
    """Let callbacks of transformers' Trainer see a training, as `on_step` of `Trainer.run`.

    They are called when the training begins and ends, and after every step, on the main process of several. They get
    every number of the log; one that sets `control.should_training_stop` stops the run, which can be resumed. Other
    requests of a callback, to evaluate or to save, are ignored: checkpoints are written by the recipe's
    `schedule.checkpoint_seconds`.

        with TrainerCallbacks(trainer, ["tensorboard"]) as callbacks:
            trainer.run(callbacks)
    """

    def __init__(self, trainer: Trainer, callbacks: Sequence[str | TrainerCallback | type[TrainerCallback]]) -> None:
        """Build the callbacks.

        Args:
            trainer: what trains.
            callbacks: instances, classes, or names of trackers that transformers knows, as "tensorboard".

        Raises:
            TransformerFamError: there is no such tracker, or a callback is none of transformers' Trainer.
            MissingPackageError: its package is not installed.
        """
        built: list[Any] = [DefaultFlowCallback]  # without which CallbackHandler warns
        for callback in callbacks:
            kind = callback if isinstance(callback, type) else type(callback)
            if not issubclass(kind, str | TrainerCallback):
                raise TransformerFamError(
                    f"a callback is {callback!r}, required is the name of a tracker or a TrainerCallback"
                )
            built += trackers([callback]) if isinstance(callback, str) else [callback]
        self.arguments = TrainingArguments(
            output_dir=str(trainer.folder), max_steps=trainer.recipe.schedule.steps, report_to=[], use_cpu=True
        )
        self.state = TrainerState(
            global_step=trainer.step,
            max_steps=trainer.recipe.schedule.steps,
            is_local_process_zero=trainer.ranks.is_main,
            is_world_process_zero=trainer.ranks.is_main,
        )
        self.control = TrainerControl()
        self.handler = CallbackHandler(built, trainer.model, trainer.tokenizer, trainer.optimizer, None)

    def __enter__(self) -> Self:
        """Say that the training begins."""
        self.control = self.handler.on_train_begin(self.arguments, self.state, self.control)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say that it ends."""
        self.control = self.handler.on_train_end(self.arguments, self.state, self.control)

    def __call__(self, trainer: Trainer, row: Mapping[str, Any]) -> bool:
        """Pass a step on, and return whether a callback wants the training to stop."""
        self.state.global_step = trainer.step
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self.state.log_history.append(numbers)
        self.control = self.handler.on_log(self.arguments, self.state, self.control, numbers)
        self.control = self.handler.on_step_end(self.arguments, self.state, self.control)
        return bool(self.control.should_training_stop)


def trackers(names: Sequence[str]) -> list[TrainerCallback]:
    """Return the trackers of these names.

    Args:
        names: that transformers knows, as "tensorboard".

    Raises:
        TransformerFamError: there is no such tracker.
        MissingPackageError: its package is not installed.
    """
    found: list[TrainerCallback] = []
    for name in names:
        try:
            found += [kind() for kind in get_reporting_integration_callbacks(name)]
        except ValueError as error:  # transformers' own, which lists the known ones
            raise TransformerFamError(f"there is no tracker {name!r}: {error}") from error
        except (ImportError, RuntimeError, AssertionError) as error:
            raise MissingPackageError(f"the tracker {name!r} cannot be used ({error}); install its package") from error
    return found
