"""Trackers of accelerate see a training: every number, the recipe, and a clear error where one is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from training_recipes import SMALLEST_TRAINING, small_recipe
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.tools.trackers import Trackers, flat_values
from transformerfam.training.trainer import Trainer


class Noted(GeneralTracker):
    """Notes what it is given."""

    name = "noted"
    requires_logging_directory = False
    tracker = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.options = arguments, options
        self.events: list[Any] = []

    def start(self) -> None:
        self.events.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.events.append((step, values))

    def finish(self) -> None:
        self.events.append("finish")


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_tracker_gets_every_number_and_the_recipe(tmp_path: Path) -> None:
    """Catches a step that is missed, numbers of another step, and a tracker that is not ended after an error."""
    trainer, noted = Trainer(small_recipe(schedule={"steps": 3}), tmp_path / "run"), Noted()
    with Trackers(trainer, [noted]) as on_step:
        trainer.run(on_step)
    begin, values, *steps, end = noted.events
    assert (begin, end) == ("start", "finish")
    assert (values["fam.block_size"], values["schedule.steps"]) == (16, 3)
    for (step, numbers), row in zip(steps, steps_of(tmp_path / "run"), strict=True):
        assert step == row.pop("step")
        kept = {n: v for n, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        assert numbers == kept
    broken = Noted()
    with pytest.raises(ZeroDivisionError), Trackers(trainer, [broken]):
        1 / 0  # noqa: B018
    assert broken.events[-1] == "finish"


def test_tracker_by_name_knows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches runs that all have one name on the tracker's page."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Noted)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    trainer = Trainer(small_recipe(), tmp_path / "mine")
    (tracker,) = Trackers(trainer, ["wandb", "wandb"]).trackers
    assert tracker.options == (("transformerfam",), {"name": "mine"})


def test_command_refuses_a_tracker_before_it_begins_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an hour of training whose numbers go nowhere, and an error without the command that installs it."""
    monkeypatch.setattr(tracking, "_available_trackers", [])
    (tmp_path / "small.toml").write_text(SMALLEST_TRAINING)
    command = ["train", str(tmp_path / "small.toml"), "--output", str(tmp_path / "run"), "--log-to"]
    for name, message in (
        ("tensorbord", "there is no tracker 'tensorbord'; take one of aim, clearml, comet_ml"),
        ("tensorboard", "'tensorboard' is not installed; install it with: pip install 'transformerfam[track]'"),
        ("comet_ml", "'comet_ml' is not installed; install it with: pip install comet-ml"),
        ("wandb", "'wandb' is not installed; install it with: pip install wandb"),
    ):
        result = CliRunner().invoke(app, [*command, name])
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "run").exists()


def test_events_of_tensorboard_have_every_step_once(tmp_path: Path) -> None:
    """Catches events that TensorBoard does not read, and steps that a second run in the folder leaves there twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "small.toml").write_text(SMALLEST_TRAINING)
    command = ["train", str(tmp_path / "small.toml"), "--output", str(tmp_path / "run"), "--log-to", "tensorboard"]
    for more in ([], ["--overwrite"]):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
    assert "tensorboard --logdir" in result.output
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = steps_of(tmp_path / "run")
    assert [event.step for event in events.Scalars("loss")] == [row["step"] for row in rows]
    for event, row in zip(events.Scalars("loss"), rows, strict=True):
        assert abs(event.value - row["loss"]) < 1e-5


def test_values_are_flat_and_plain() -> None:
    """Catches lists and paths, which trackers refuse."""
    nested = {"a": {"b": 1, "c": [1, 2]}, "d": None, "e": Path("x"), "f": True}
    assert flat_values(nested) == {"a.b": 1, "a.c": "[1, 2]", "d": "null", "e": "x", "f": True}
