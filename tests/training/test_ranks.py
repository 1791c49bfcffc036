"""Several processes train as one does: two of them on the CPU, as `accelerate launch` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import Done, run_in_processes
from tiny_models import save_passkey_model
from training_recipes import small_values

from transformerfam.errors import CorruptFileError, RecipeError, UnsupportedVersionError
from transformerfam.reports.rows import read_rows
from transformerfam.training.ranks import Ranks
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.trainer import Trainer
from transformerfam.versions import OLDEST_TORCH_THAT_SHARDS, release
from transformerfam.weights.models import load_model

RECIPES: dict[str, dict[str, Any]] = {
    "first": {"state_passing": {"probability": 0.8, "rows": "first"}},
    "all": {"state_passing": {"probability": 0.8, "rows": "all", "ask_later": 0.5, "overwrite": 0.5}},
    "sharded": {
        "state_passing": {"probability": 0.8, "rows": "first"},
        "optimizer": {"average_decay": 0.9},
        "schedule": {"shard": True},
    },
    "in parts": {
        "state_passing": {"probability": 0.8, "rows": "all", "ask_later": 0.5, "overwrite": 0.5},
        "schedule": {"accumulate": 2},
    },
    "later": {"state_passing": {"probability": 0.9, "start_step": 2}, "optimizer": {"average_decay": 0.9}},
}

needs_sharding = pytest.mark.skipif(
    release(torch.__version__) < release(OLDEST_TORCH_THAT_SHARDS),
    reason=f"sharding needs torch {OLDEST_TORCH_THAT_SHARDS}; the mark goes when that is the oldest one supported",
)
MARKS = {"sharded": [needs_sharding, pytest.mark.slow]} | dict.fromkeys(("first", "all", "later"), pytest.mark.slow)


def values_of(name: str) -> dict[str, Any]:
    sections = dict(RECIPES[name])
    schedule = {"steps": 6, "batch_size": 4} | sections.pop("schedule", {})
    return small_values(schedule=schedule, **sections)


def write_toml(path: Path, values: dict[str, Any]) -> None:
    """Write a recipe's sections; curricula are lists of tables."""
    lines = []
    for section, fields in values.items():
        tables = {name: value for name, value in fields.items() if name == "curriculum"}
        lines += [f"[{section}]"] + [f"{k} = {json.dumps(v)}" for k, v in fields.items() if k not in tables]
        for name, rows in tables.items():
            for row in rows:
                lines += [f"[[{section}.{name}]]"] + [f"{k} = {json.dumps(v)}" for k, v in row.items()]
    path.write_text("\n".join(lines) + "\n")


def launch(recipe: Path, output: Path, *options: str) -> Done:
    return run_in_processes(recipe.parent, ["train", str(recipe), "--output", str(output), *options], number=2)


def accelerate_launch(arguments: list[str]) -> Done:
    """Run a command of this package in two processes on the CPU that accelerate starts."""
    # With --cpu accelerate starts one process, or several through MPI; as for GPUs it starts them by torch.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "transformerfam", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def losses_of(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {row["processes"] for row in rows} == {1 if folder.name == "one" else 2}
    return [[row["loss"], row["key_loss"], row["key_accuracy"], row["grad_norm"]] for row in rows]


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) if name in MARKS else name for name in RECIPES])
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    """Catches gradients that are not shared, rows that are read twice, and states that go to the wrong process."""
    values = values_of(name)
    Trainer(build_recipe(values), tmp_path / "one").run()
    write_toml(tmp_path / "recipe.toml", values)
    if name == "all":  # once by the command that the docs give
        done = accelerate_launch(["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "two")])
    else:
        done = launch(tmp_path / "recipe.toml", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert len(found) == 6
    for row, required in zip(found, expected, strict=True):
        assert row == pytest.approx(required, rel=1e-5, abs=1e-5)
    models = [load_model(tmp_path / folder)[0] for folder in ("one", "two")]
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        assert (other - parameter).norm() < 1e-5 * parameter.norm()


def test_batch_read_in_parts_trains_as_a_whole_one(tmp_path: Path) -> None:
    """Catches parts whose gradients are averaged instead of added up, and rows that start from another's state."""
    for parts in (1, 4):
        values = values_of("in parts")
        values["schedule"]["accumulate"] = parts
        Trainer(build_recipe(values), tmp_path / str(parts)).run()
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "14"]
    for whole, *in_parts in zip(*logs, strict=True):
        for row in in_parts:
            for name in ("loss", "key_loss", "key_accuracy", "key_accuracy_asked_later", "grad_norm", "fam_norm"):
                expected = whole[name] if whole[name] is None else pytest.approx(whole[name], rel=1e-4, abs=1e-5)
                assert row[name] == expected, name
    with pytest.raises(RecipeError, match="schedule.accumulate is 3, required is at least 1 and a divisor"):
        build_recipe(small_values(schedule={"batch_size": 4, "accumulate": 3}))


def test_evaluation_is_spread_over_processes(tmp_path: Path) -> None:
    """Catches keys that are queried twice or not at all, and rows of one process that another cuts off."""
    save_passkey_model(tmp_path / "model")
    command = ["evaluate", "passkey", "--model", str(tmp_path / "model"), "--filler-tokens", "20,60", "--num-keys", "5"]
    assert run_in_processes(tmp_path, [*command, "--output", str(tmp_path / "alone.jsonl")]).returncode == 0
    done = run_in_processes(tmp_path, [*command, "--output", str(tmp_path / "shared.jsonl")], number=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        sorted((row["key"], row["filler_tokens"], row["answer"]) for row in read_rows([tmp_path / name]))
        for name in ("alone.jsonl", "shared.jsonl")
    ]
    assert len(found[0]) == 10
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "name", [pytest.param("all", marks=pytest.mark.slow), pytest.param("sharded", marks=needs_sharding)]
)
def test_two_processes_go_on_where_they_stopped(name: str, tmp_path: Path) -> None:
    """Catches passed states or shares of one process that a checkpoint leaves out, or gives to both."""
    values = values_of(name)
    write_toml(tmp_path / "recipe.toml", values)
    assert launch(tmp_path / "recipe.toml", tmp_path / "whole").returncode == 0
    first = launch(tmp_path / "recipe.toml", tmp_path / "parts", "--set", "schedule.max_seconds=0.0")
    assert first.returncode == 0, first.stderr[-3000:]
    shares = sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*.safetensors"))
    assert shares == (
        ["checkpoint-1-1-of-2.safetensors", "checkpoint-1-2-of-2.safetensors"] if name == "sharded" else []
    )
    second = launch(tmp_path / "recipe.toml", tmp_path / "parts", "--resume")
    assert second.returncode == 0, second.stderr[-3000:]
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


@needs_sharding
def test_one_process_goes_on_with_the_shares_of_two(tmp_path: Path) -> None:
    """Catches shares that are joined in the wrong order, or that only as many processes can take up again."""
    write_toml(tmp_path / "recipe.toml", values_of("sharded"))
    whole = Trainer(build_recipe(values_of("sharded")), tmp_path / "whole")
    assert whole.run().is_complete
    first = launch(tmp_path / "recipe.toml", tmp_path / "parts", "--set", "schedule.max_seconds=0.0")
    assert first.returncode == 0, first.stderr[-3000:]
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "parts").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    Trainer(build_recipe(values_of("sharded")), tmp_path / "parts", resume=True).run()
    found, required = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("parts", "whole")
    )
    assert found == pytest.approx(required, abs=1e-5)
    (tmp_path / "copy" / "checkpoint-1-2-of-2.safetensors").unlink()
    with pytest.raises(CorruptFileError, match="checkpoint-1-2-of-2.safetensors does not exist"):
        Trainer(build_recipe(values_of("sharded")), tmp_path / "copy", resume=True)


def test_torch_that_cannot_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends in torch's "got mixed torch.Tensor and DTensor" after its first step."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with pytest.raises(UnsupportedVersionError, match=r"torch is 2\.10\.0, required for schedule.shard is .*2\.11"):
        Ranks(build_recipe(values_of("sharded")))


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    write_toml(tmp_path / "odd.toml", small_values(schedule={"steps": 2, "batch_size": 3}))
    done = launch(tmp_path / "odd.toml", tmp_path / "odd")
    assert done.returncode != 0
    assert "required for 2 processes is a multiple of their number" in done.stderr


def test_processes_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a process with another recipe, which would hang or train another model."""
    recipe = build_recipe(small_values())
    ranks = Ranks(recipe)
    monkeypatch.setattr(ranks, "accelerator", object())
    monkeypatch.setattr(ranks, "gather_objects", lambda value: [value, value, {"other": 1}])
    with pytest.raises(RecipeError, match="process 2 has another recipe than process 0; start all with the same"):
        ranks.require_alike(recipe.to_dict(), "recipe")
