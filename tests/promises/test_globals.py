"""What holds for a whole process is set by a command: the library leaves threads, random numbers and the rest alone."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_recipes import small_recipe
from typer.testing import CliRunner

import transformerfam
from transformerfam.cli import compare as compare_module
from transformerfam.cli.app import app
from transformerfam.training.random_numbers import RandomNumbers
from transformerfam.training.trainer import Trainer

SOURCE = Path(transformerfam.__file__).parent
SETTERS = {
    "basicConfig",
    "disable_progress_bar",
    "enable_full_determinism",
    "filterwarnings",
    "manual_seed_all",
    "putenv",
    "seed_all",
    "set_default_device",
    "set_default_dtype",
    "set_deterministic_debug_mode",
    "set_float32_matmul_precision",
    "set_flush_denormal",
    "set_grad_enabled",
    "set_num_interop_threads",
    "set_num_threads",
    "set_printoptions",
    "set_rng_state",
    "set_seed",
    "set_start_method",
    "set_verbosity",
    "setlocale",
    "setrecursionlimit",
    "simplefilter",
    "use_deterministic_algorithms",
}
SEEDERS = {"manual_seed", "seed"}
"""Which a generator has, too."""
MODULES = ("torch", "torch.random", "torch.cuda", "random", "numpy.random", "np.random")
RESTORING = {"fork_rng", "catch_warnings"}
"""In the body of a `with` of these, what is set ends with it."""
PROCESS_WIDE = ("os.environ", "torch.backends", "torch._dynamo.config", "torch._inductor.config", "sys.path")


def restores(node: ast.AST) -> bool:
    """Whether a `with` statement puts back what its body sets."""
    if not isinstance(node, ast.With):
        return False
    calls = [part for item in node.items for part in ast.walk(item.context_expr) if isinstance(part, ast.Call)]
    return any(ast.unparse(call.func).split(".")[-1] in RESTORING for call in calls)


def sets_something(node: ast.AST) -> bool:
    """Whether this sets what holds for the whole process."""
    if isinstance(node, ast.Call):
        owner, _, name = ast.unparse(node.func).rpartition(".")
        is_environment = owner == "os.environ" and name in ("update", "setdefault", "pop", "clear")
        return name in SETTERS or (name in SEEDERS and owner in MODULES) or is_environment
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
        return any(ast.unparse(target).startswith(PROCESS_WIDE) for target in targets)
    return False


def found_in(node: ast.AST) -> Iterator[int]:
    """Yield the lines that set something for good."""
    for child in ast.iter_child_nodes(node):
        if restores(child):
            continue
        if sets_something(child):
            yield child.lineno  # type: ignore[attr-defined]
        yield from found_in(child)


def test_no_module_but_the_command_sets_what_holds_for_the_process() -> None:
    """Catches a constructor that changes threads, seeds or denormals of the program that calls it."""
    places = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] != "cli"
        for line in found_in(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert places == []


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("torch.set_num_threads(1)", True),
        ("def f():\n    torch.manual_seed(0)", True),
        ("from random import seed\nrandom.seed(0)", True),
        ("torch.Generator().manual_seed(0)", False),
        ("with torch.random.fork_rng([]):\n    torch.manual_seed(0)", False),
        ("with torch.no_grad():\n    torch.manual_seed(0)", True),
        ("with warnings.catch_warnings():\n    warnings.simplefilter('error')", False),
        ("os.environ['OMP_NUM_THREADS'] = '1'", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("rank = os.environ['RANK']", False),
    ],
)
def test_setting_is_told_from_what_is_none(text: str, is_found: bool) -> None:
    """Catches a check that finds nothing whatever is there."""
    assert bool(list(found_in(ast.parse(text)))) is is_found


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def with_dropout(folder: Path, **options: Any) -> Trainer:
    """Return a trainer of a model with dropout, which draws in every step."""
    trainer = Trainer(small_recipe(lora={"rank": 2}, model={"base": "tiny-random"}), folder, **options)
    for layer in trainer.model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.1
    return trainer


def test_training_leaves_the_process_as_it_was_and_draws_its_own_numbers(tmp_path: Path) -> None:
    """Catches a run that depends on what was drawn before it, or changes what is drawn after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    trainer = with_dropout(tmp_path / "first")
    trainer.run()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    second = with_dropout(tmp_path / "second")
    torch.rand(7)
    second.run()
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_resumed_run_draws_on(tmp_path: Path) -> None:
    """Catches a resumed run that draws from its seed again, or from the process's numbers."""
    with_dropout(tmp_path / "whole").run()
    first = with_dropout(tmp_path / "halves")

    def stop(trainer: Trainer, row: dict[str, Any]) -> None:
        if row["step"] == 2:
            trainer.save_checkpoint()
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        first.run(stop)
    with_dropout(tmp_path / "halves", resume=True).run()
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_random_numbers_are_those_of_a_seeded_process() -> None:
    """Catches runs that give other weights than they gave when the process was seeded."""
    torch.manual_seed(5)
    expected = torch.rand(4), torch.rand(2)
    numbers = RandomNumbers(5)
    assert torch.equal(numbers.state, torch.Generator().manual_seed(5).get_state())
    with numbers.in_force():
        first = torch.rand(4)
        state = numbers.state
    torch.rand(9)
    with numbers.in_force():
        second = torch.rand(2)
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    again = RandomNumbers(0)
    again.go_on_from(state)
    with again.in_force():
        assert torch.equal(torch.rand(2), expected[1])


@pytest.mark.parametrize("command", ["train", "compare"])
def test_command_sets_threads_and_denormals(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `schedule.threads` that is not applied any more, and steps slowed down by denormal numbers."""
    done: list[Any] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda number: done.append(("threads", number)))
    monkeypatch.setattr(torch, "set_flush_denormal", lambda flag: done.append(("denormals", flag)))
    recipe = Path("recipes/tiny_passkey.toml").resolve()
    if command == "train":
        monkeypatch.setattr("transformerfam.cli.train.Trainer", lambda *a, **b: done.append("trains") or 1 / 0)
        arguments = ["train", str(recipe), "--set", "schedule.threads=3", "--output", str(tmp_path / "run")]
    else:
        monkeypatch.setattr(compare_module, "run_one", lambda *a: done.append("trains"))
        comparison = tmp_path / "comparison.toml"
        comparison.write_text(
            'name = "small"\nrecipe = "training.toml"\nsystems = ["fam"]\nseeds = [0]\nnum_keys = 4\nbatch_size = 4\n'
            "filler_tokens = [64]\n"
        )
        text = Path("recipes/compare_short_training.toml").read_text()
        (tmp_path / "training.toml").write_text(re.sub(r"(?m)^threads = \d+$", "threads = 3", text))
        arguments = ["compare", str(comparison), "--run", "fam-0", "--output", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert done == [("threads", 3), ("denormals", True), "trains"], (result.output, result.exception)
