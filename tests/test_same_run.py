"""Resume means the same run: what may change, what may not, and how to go on where there is nothing to resume."""

import json
import shlex
import signal

import pytest
from command_line import run
from test_cli import RECIPE
from test_comparison import SMALL
from training_recipes import small_recipe

from transformerfam.comparison import RunName, load_comparison, run_one
from transformerfam.comparison import run as comparison_run
from transformerfam.comparison.run import ROWS_FILE
from transformerfam.comparison.schedule import Schedule
from transformerfam.errors import RecipeError
from transformerfam.reports.rows import RowFile
from transformerfam.training import trainer as trainer_module
from transformerfam.training.trainer import Trainer

SMALL_TRAINING = RECIPE.replace("[1, 9]", "[0, 4]")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("schedule", {"batch_size": 4}),
        ("schedule", {"seed": 1}),
        ("schedule", {"curriculum": [{"filler_tokens": [1, 3]}]}),
        ("schedule", {"gradient_tokens": 4}),
        ("optimizer", {"lr": 1.0}),
        ("fam", {"fam_norm_bound": 2.0}),
        ("lora", {"rank": 2}),
        ("state_passing", {"probability": 0.5}),
    ],
)
def test_other_recipe_is_refused_by_the_name_of_its_key(tmp_path, section, change):
    """Would catch steps of two recipes in one memory."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    with pytest.raises(RecipeError, match=f"section {section} differs, .* is .* there and .* here"):
        Trainer(small_recipe(**{section: change}), tmp_path, resume=True)


@pytest.mark.parametrize(
    "change", [{"steps": 2}, {"max_seconds": 99.0}, {"log_every": 2}, {"checkpoint_seconds": 1.0}, {"threads": 1}]
)
def test_steps_time_log_and_threads_may_change(tmp_path, change):
    """Would catch a run that cannot be made longer, or resumed on another machine."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    Trainer(small_recipe(schedule={"steps": 1} | change), tmp_path, resume=True)


def test_command_to_go_on_repeats_every_change(tmp_path, monkeypatch):
    """Would catch a command that resumes another run than the one that it was printed for."""
    recipe, output = tmp_path / "my recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    plain = trainer_module.Trainer._train_step

    def interrupted(self):
        monkeypatch.undo()
        signal.raise_signal(signal.SIGINT)
        return plain(self)

    monkeypatch.setattr(trainer_module.Trainer, "_train_step", interrupted)
    changes = ("--set", "schedule.batch_size=3", "--set", "fam.fam_length=1")
    text = run("train", recipe, "--output", output, *changes, status=130)
    command = shlex.split(text[text.index("go on with: fam train") :].removeprefix("go on with: fam "))
    assert command[:3] == ["train", str(recipe), "--resume"]
    assert "3 steps" in run(*command)


def test_run_that_was_killed_before_its_first_checkpoint_starts_over(tmp_path, monkeypatch):
    """Would catch a remedy that is none, and steps that stand in the log twice."""
    monkeypatch.setattr(trainer_module.Trainer, "save_checkpoint", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Trainer(small_recipe(schedule={"steps": 2}), tmp_path).run()
    monkeypatch.undo()
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    text = run("train", recipe, "--output", tmp_path, "--resume", status=2)
    assert "run the same command without --resume, which starts over" in text
    recipe.unlink()
    Trainer(small_recipe(schedule={"steps": 2}), tmp_path).run()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1]


def test_advice_of_a_loss_that_is_not_finite_is_one_that_can_be_followed(tmp_path):
    """Would catch "resume with a lower lr", which --resume refuses."""
    assert "train into another folder" in trainer_module.TRY_AGAIN


# Comparisons


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_run, "BYTES_LENGTHS", (8,))
    (tmp_path / "training.toml").write_text(SMALL_TRAINING)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)

    def load(*changes):
        return load_comparison(path, ['systems=["fam", "fam_untrained"]', "max_filler_tokens={}", *changes])

    return load


@pytest.mark.parametrize(
    ("system", "change"), [("fam", "recipe.schedule.steps=4"), ("fam_untrained", "recipe.schedule.batch_size=3")]
)
def test_run_of_a_comparison_does_not_go_on_by_another_recipe(comparison, tmp_path, system, change):
    """Would catch 31 steps of one recipe and 119 of another that are stored as one."""
    name = RunName(system, 0)
    run_one(comparison(), name, tmp_path / "runs")
    with pytest.raises(RecipeError, match=f"section schedule differs, {change.split('.')[-1].partition('=')[0]} is"):
        run_one(comparison(change), name, tmp_path / "runs")
    run_one(comparison("recipe.schedule.log_every=2"), name, tmp_path / "runs")


def test_rows_of_a_scheduler_that_was_killed_are_not_written_twice(comparison, tmp_path):
    """Would catch questions that count double."""
    plan = comparison('systems=["fam_untrained"]')
    (name,) = plan.runs
    run_one(plan, name, tmp_path / "runs")
    schedule = Schedule(plan, tmp_path / "runs", tmp_path / "rows.jsonl", ["true"])
    lines = (tmp_path / "runs" / str(name) / ROWS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:2]))
    with RowFile(tmp_path / "rows.jsonl") as schedule.rows:
        assert schedule._run(name)
    assert (tmp_path / "rows.jsonl").read_text() == "".join(lines)
