"""Callbacks of transformers' Trainer see a training, and can stop it."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_recipes import SMALLEST_TRAINING, small_recipe
from transformers import TrainerCallback
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.tools import callbacks as callbacks_module
from transformerfam.tools.callbacks import TrainerCallbacks
from transformerfam.training.trainer import Trainer


class Noted(TrainerCallback):
    """Notes what it is given, and requests a stop after a step."""

    def __init__(self, last_step: int = 99) -> None:
        self.last_step = last_step
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["model"] is not None
        self.events.append(("begin", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step >= self.last_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(("end", state.global_step))


def train(folder: Path, *callbacks: Any, resume: bool = False) -> Any:
    trainer = Trainer(small_recipe(), folder, resume=resume)
    with TrainerCallbacks(trainer, callbacks) as on_step:
        return trainer.run(on_step)


def test_callback_sees_every_step_and_every_number(tmp_path: Path) -> None:
    """Catches a tracker that misses a step, or numbers that are not those of the log."""
    noted = Noted()
    assert train(tmp_path / "run", noted).is_complete
    assert noted.events == [("begin", 0), *[("step", step) for step in range(1, 7)], ("end", 6)]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for told, row in zip(noted.logs, log, strict=True):
        assert told["loss"] == row["loss"]
        assert told == {name: value for name, value in row.items() if isinstance(value, int | float)}


def test_callback_stops_a_run_that_is_resumed_exactly(tmp_path: Path) -> None:
    """Catches a stop that is ignored, or that leaves a run which continues differently."""
    train(tmp_path / "whole")
    first, second = Noted(last_step=2), Noted()
    result = train(tmp_path / "halves", first)
    assert not result.is_complete
    assert result.steps == 2
    assert train(tmp_path / "halves", second, resume=True).is_complete
    assert second.events[:2] == [("begin", 2), ("step", 3)]
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert train(tmp_path / "last", Noted(last_step=6)).is_complete  # the last step is the end in any case


def test_trackers_are_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name that is not looked up, and a tracker that silently is not there."""
    trainer = Trainer(small_recipe(), tmp_path)
    with pytest.raises(TransformerFamError, match="there is no tracker 'tensorbord': .*tensorboard"):
        TrainerCallbacks(trainer, ["tensorbord"])
    for wrong in (3, int):
        with pytest.raises(TransformerFamError, match="required is the name of a tracker or a TrainerCallback"):
            TrainerCallbacks(trainer, [wrong])  # type: ignore[list-item]

    class Missing(TrainerCallback):
        def __init__(self) -> None:
            raise RuntimeError("it requires a package")

    monkeypatch.setattr(callbacks_module, "get_reporting_integration_callbacks", lambda name: [Missing])
    with pytest.raises(MissingPackageError, match="the tracker 'mlflow' cannot be used \\(it requires a package\\)"):
        TrainerCallbacks(trainer, ["mlflow"])
    monkeypatch.setattr(callbacks_module, "get_reporting_integration_callbacks", lambda name: [Noted])
    assert isinstance(TrainerCallbacks(trainer, ["mlflow"]).handler.callbacks[-1], Noted)


def test_command_refuses_a_tracker_before_it_begins_a_run(tmp_path: Path) -> None:
    """Catches a folder that holds the beginning of a run, so that the command cannot be given again."""
    (tmp_path / "small.toml").write_text(SMALLEST_TRAINING)
    arguments = ["train", str(tmp_path / "small.toml"), "--output", str(tmp_path / "run"), "--report-to"]
    result = CliRunner().invoke(app, [*arguments, "tensorbord"])
    assert result.exit_code != 0
    assert "there is no tracker 'tensorbord'" in result.output
    assert not (tmp_path / "run").exists()
