"""Trackers of accelerate, as TensorBoard or Weights & Biases, that get every number of a training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.training.trainer import Trainer

PROJECT = "transformerfam"
TENSORBOARD = "tensorboard"
PACKAGES = {TENSORBOARD: "'transformerfam[track]'", "comet_ml": "comet-ml"}
"""What pip installs for a tracker whose package has another name."""
NAMED_BY = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
"""The argument by which a tracker calls a run; others call it after the project, or by an option of their own."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that cannot be used, before anything is trained.

    Args:
        names: that accelerate knows, as "tensorboard".

    Raises:
        TransformerFamError: there is no such tracker.
        MissingPackageError: accelerate, or the tracker's own package, is not installed.
    """
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise MissingPackageError(
            "trackers need the package accelerate, which is not installed; install it with: "
            "pip install 'transformerfam[track]'"
        ) from error
    known, there = sorted(LOGGER_TYPE_TO_CLASS), {str(name.value) for name in get_available_trackers()}
    for name in names:
        if name not in known:
            raise TransformerFamError(f"there is no tracker {name!r}; take one of {', '.join(known)}")
        if name not in there:
            raise MissingPackageError(
                f"the tracker {name!r} is not installed; install it with: pip install {PACKAGES.get(name, name)}"
            )


class Trackers:
    """Let trackers see a training, as `on_step` of `Trainer.run`: every number of the log, and the recipe.

    TensorBoard's events are in the run's folder, in `tensorboard`; events of steps that a resumed or new run does again
    are hidden. Of several processes the first one reports.

        with Trackers(trainer, ["tensorboard"]) as on_step:
            trainer.run(on_step)
    """

    def __init__(self, trainer: Trainer, trackers: Sequence[Any]) -> None:
        """Build the trackers.

        Args:
            trainer: what trains.
            trackers: names that accelerate knows, as "tensorboard", or instances of its `GeneralTracker`.

        Raises:
            TransformerFamError: there is no such tracker.
            MissingPackageError: its package is not installed.
        """
        require_trackers([tracker for tracker in trackers if isinstance(tracker, str)])
        self.trainer = trainer
        self.trackers: list[Any] = []
        if trainer.ranks.is_main:
            named = dict.fromkeys(trackers)
            self.trackers += [self._built(tracker) if isinstance(tracker, str) else tracker for tracker in named]

    def _built(self, name: str) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, folder = LOGGER_TYPE_TO_CLASS[name], self.trainer.folder
        if name == TENSORBOARD:
            return kind(TENSORBOARD, folder, purge_step=self.trainer.step)
        options = {NAMED_BY[name]: folder.name} if name in NAMED_BY else {}
        return kind(PROJECT, **({"logging_dir": folder} if kind.requires_logging_directory else {}), **options)

    def __enter__(self) -> Self:
        """Begin to report, with the recipe."""
        values = flat_values(self.trainer.recipe.to_dict())
        for tracker in self.trackers:
            tracker.start()
            if not (tracker.name == TENSORBOARD and self.trainer.step):  # its folder has the recipe already
                tracker.store_init_configuration(values)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left, and end."""
        for tracker in self.trackers:
            tracker.finish()

    def __call__(self, trainer: Trainer, row: Mapping[str, Any]) -> bool:
        """Report a step; no tracker stops a training."""
        numbers = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        for tracker in self.trackers:
            tracker.log(numbers, step=row["step"])
        return False


def flat_values(values: Mapping[str, Any], within: str = "") -> dict[str, bool | int | float | str]:
    """Return nested values by their path, as `fam.block_size`; lists, paths and what is not set as texts."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{within}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[f"{within}{name}"] = value
        else:
            flat[f"{within}{name}"] = str(value) if isinstance(value, Path) else json.dumps(value, default=str)
    return flat
