"""`fam compare`: one recipe for all systems, runs that resume where they were stopped, reports of what is missing."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import FileLock
from launched import Forked, start_in_session
from rich.console import Console
from training_recipes import SMALL_COMPARISON as SMALL
from training_recipes import SMALL_TRAINING
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.comparison import RunName, load_comparison, run_one, schedule
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.passkey import PasskeyComparison
from transformerfam.comparison.plan import SYSTEMS
from transformerfam.comparison.report import EMPTY, cells, comparison_tables
from transformerfam.comparison.run import TRAINED_TASK, is_finished
from transformerfam.comparison.schedule import Schedule
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.reports.markdown import write_markdown
from transformerfam.reports.rows import read_rows
from transformerfam.rivals import RIVAL_NAMES
from transformerfam.training.recipe.toml import build_recipe
from transformerfam.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
STATE_PASSING = """
[state_passing]
probability = 0.9
rows = "all"
ask_later = 0.5
overwrite = 0.0
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a small comparison and the recipe that it names."""
    (tmp_path / "training.toml").write_text(SMALL_TRAINING + STATE_PASSING)
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def shown(table: Any, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    "changes",
    [
        '{"schedule.curriculum.0.filler_tokens"=[1,2]}',
        '{"schedule.curriculum.0.data.key_digits"=[1,1]}',
        "{schedule={steps=77,batch_size=1}}",
        "{data={key_digits=[1,2]}}",
        '{"data.key_digits"=[1,2]}',
    ],
)
def test_other_budget_is_refused_however_it_is_written(recipe: Path, changes: str) -> None:
    """Catches a system that is trained on easier texts than the others."""
    with pytest.raises(RecipeError, match="so that rmt would be trained with another budget"):
        load_comparison(recipe, [f"changes.rmt={changes}"])


def test_every_system_gets_a_recipe_with_one_budget(recipe: Path) -> None:
    """Catches a system that is trained longer, on other data, or with what only FAM has."""
    systems = [name for name in SYSTEMS if name != "fam_memory_zeroed"]
    comparison = load_comparison(recipe, [f"systems={json.dumps([*systems, 'fam_memory_zeroed'])}", "seeds=[0,1]"])
    assert len(comparison.runs) == 2 * len(systems)
    recipes = {run: comparison.recipe_of(run) for run in comparison.runs}
    first = recipes[RunName("fam", 1)]
    for run, own in recipes.items():
        assert (own.schedule.seed, own.model.seed) == (run.seed, run.seed)
        if run.seed == 1:
            assert (own.schedule, own.data, own.loss) == (first.schedule, first.data, first.loss)
            assert own.fam.block_size == 16
        passes = own.state_passing.probability > 0
        growing_or_none = run.system in ("full", "autocompressor", "attention_sinks", "transformer_xl")
        assert passes != (growing_or_none or run.system.startswith("bswa"))
    assert recipes[RunName("rmt", 0)].rival is not None
    assert recipes[RunName("rmt", 0)].rival.num_memory_tokens == 2  # type: ignore[union-attr]
    assert recipes[RunName("bswa_m6", 0)].fam.num_memory_segments == 6


def test_name_of_a_run_ends_in_a_number() -> None:
    """Catches a digit that is no decimal one."""
    assert RunName.parse("fam-12") == RunName("fam", 12)
    for text in ("fam-\u00b2", "fam-", "-1", "fam"):
        with pytest.raises(RecipeError, match="is no run, required is SYSTEM-SEED"):
            RunName.parse(text)


def test_variants_are_systems_with_changes(recipe: Path) -> None:
    """Catches an ablation that changes nothing, or every system."""
    names = ['systems=["fam","fam_f4","rmt_4"]', 'variants={fam_f4="fam",rmt_4="rmt"}', "max_filler_tokens={}"]
    changes = ['changes={fam_f4={"fam.fam_length"=4},rmt_4={"rival.num_memory_tokens"=4}}']
    comparison = load_comparison(recipe, [*names, *changes])
    assert comparison.recipe_of(RunName("fam", 0)).fam.fam_length == 2
    assert comparison.recipe_of(RunName("fam_f4", 0)).fam.fam_length == 4
    rival = comparison.recipe_of(RunName("rmt_4", 0)).rival
    assert rival is not None
    assert rival.num_memory_tokens == 4


def test_bad_comparisons_are_refused(recipe: Path, tmp_path: Path) -> None:
    """Catches unknown systems, and budgets that differ by mistake."""
    with pytest.raises(RecipeError, match="no system 'rnt'; did you mean rmt"):
        load_comparison(recipe, ['systems=["fam","rnt"]'])
    with pytest.raises(RecipeError, match=r"changes.rmt gives schedule.steps, so that rmt would be trained"):
        load_comparison(recipe, ['changes.rmt={"schedule.steps"=9}'])
    free = load_comparison(recipe, ['changes.rmt={"schedule.steps"=9}', "allow_different_budgets=true"])
    assert free.recipe_of(RunName("rmt", 0)).schedule.steps == 9
    with pytest.raises(RecipeError, match="armt is not among systems"):
        load_comparison(recipe, ["max_filler_tokens.armt=9"])
    with pytest.raises(RecipeError, match="fam_memory_zeroed is a control of the memory that fam trained"):
        load_comparison(recipe, ['systems=["fam_memory_zeroed"]', "max_filler_tokens={}"])
    with pytest.raises(RecipeError, match="unknown key num_key in the recipe; did you mean num_keys"):
        load_comparison(recipe, ["num_key=3"])
    with pytest.raises(RecipeError, match="cannot read"):
        load_comparison(tmp_path / "other.toml")
    with pytest.raises(RecipeError, match="fam_length is 99"):
        load_comparison(recipe, ["recipe.fam.fam_length=99"])
    with pytest.raises(RecipeError, match="'fam' is no run, required is SYSTEM-SEED"):
        RunName.parse("fam")


def test_rival_recipes_refuse_what_only_fam_has(recipe: Path) -> None:
    """Catches a rival that is trained by something that knows the FAM alone."""
    comparison = load_comparison(recipe)

    def changed(**changes: Any) -> None:
        PasskeyComparison(
            name="x",
            recipe=comparison.recipe,
            systems=("rmt",),
            filler_tokens=(8,),
            changes={"rmt": changes},
            allow_different_budgets=True,
        ).recipe_of(RunName("rmt", 0))

    with pytest.raises(RecipeError, match="required is fam.block_size"):
        changed(**{"rival.block_size": 8})
    with pytest.raises(RecipeError, match="lora, model.memory, key_bias or schedule.block_sizes"):
        changed(**{"schedule.block_sizes": [16, 24]})
    with pytest.raises(RecipeError, match="gradient_tokens or loss.fam_change"):
        changed(**{"schedule.gradient_tokens": 30})
    with pytest.raises(RecipeError, match="no FAM to update"):
        changed(**{"schedule.repeat_updates": [0, 2]})
    values = comparison.recipe_of(RunName("rmt", 0)).to_dict()
    values["rival"]["system"] = "autocompressor"
    with pytest.raises(RecipeError, match="'autocompressor' has no memory of fixed size to pass"):
        build_recipe(values)


@pytest.mark.parametrize("system", RIVAL_NAMES)
def test_rival_is_trained_saved_and_asked(
    system: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rival that the trainer, its checkpoints, the saved folder or the passkey task cannot take."""
    monkeypatch.setattr("transformerfam.comparison.run.BYTES_LENGTHS", (256, 512))
    comparison = load_comparison(recipe, [f'systems=["{system}"]', "max_filler_tokens={}"])
    run = RunName(system, 0)
    run_one(comparison, run, tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / str(run) / "rows.jsonl"])
    assert is_finished(comparison, run, rows)
    log = [json.loads(line) for line in (tmp_path / "runs" / str(run) / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert any(row["state_passed"] for row in log) == (system not in ("full", "autocompressor"))
    (trained,) = [row for row in rows if row["task"] == TRAINED_TASK]
    assert trained["steps"] == 3
    assert trained["num_tokens"] > 0
    again = read_rows([tmp_path / "runs" / str(run) / "rows.jsonl"])
    run_one(comparison, run, tmp_path / "runs")  # which has nothing left to do
    assert read_rows([tmp_path / "runs" / str(run) / "rows.jsonl"]) == again


def test_trained_rival_is_loaded_strictly(recipe: Path, tmp_path: Path) -> None:
    """Catches a rival's parameters that are loaded as another system, or into other weights."""
    comparison = load_comparison(recipe, ['systems=["rmt"]', "max_filler_tokens={}"])
    run_one(comparison, RunName("rmt", 0), tmp_path)
    folder, runner = tmp_path / "rmt-0", CliRunner()

    def asked(system: str, *more: str) -> Any:
        command = ["evaluate", "passkey", "--model", str(folder), "--system", system, "--filler-tokens", "8"]
        return runner.invoke(app, [*command, "--num-keys", "1", "--output", str(tmp_path / "rows.jsonl"), *more])

    assert asked("rmt").exit_code == 0
    wrong = asked("armt")
    assert wrong.exit_code == 2
    assert "holds a trained rmt, requested is 'armt'" in " ".join(wrong.output.split())
    other = asked("rmt", "--set", "num_memory_tokens=5")
    assert other.exit_code == 2
    assert "has memory of shape (2, 32), required is (5, 32)" in " ".join(other.output.split())
    missing = ["--model", "tiny", "--system", "rmt", "--filler-tokens", "8", "--output", str(tmp_path / "x.jsonl")]
    assert "has no trained rmt" in runner.invoke(app, ["evaluate", "passkey", *missing]).output.replace("\n", " ")


def test_comparison_runs_to_its_end_and_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a scheduler that loses a finished run or does it twice, a figure that cannot be drawn, and code that is
    run since it lies in the folder at hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("raise SystemExit('this is not torch')")
    (tmp_path / "doit.cfg").write_text("[COMMAND]\nrun = no_such_module:Run\n")
    runner, folder, rows = CliRunner(), tmp_path / "runs", tmp_path / "rows.jsonl"
    systems = 'systems = ["fam", "fam_memory_zeroed"]'
    recipe.write_text(re.sub("systems = .*", systems, SMALL).replace("full = 8", ""))
    training = tmp_path / "training.toml"
    training.write_text(training.read_text().replace("block_size = 16", "block_size = 512"))  # it reads 16,384 tokens
    command = ["compare", str(recipe), "--output", str(folder), "--rows", str(rows)]
    figure = tmp_path / "figure.svg"
    result = runner.invoke(app, [*command, "--figure", str(figure), "--table", str(tmp_path / "table.md")])
    assert result.exit_code == 0, result.output
    assert figure.read_text().count("fam_memory_zeroed") == 1
    assert (tmp_path / "table.md").read_text().count("| fam_memory_zeroed |") == 1
    found = read_rows([rows])
    comparison = load_comparison(recipe)
    assert all(is_finished(comparison, run, found) for run in comparison.runs)
    shutil.rmtree(folder)  # only the rows count
    assert runner.invoke(app, command).exit_code == 0
    assert read_rows([rows]) == found
    assert not (folder / "fam-0").exists()
    changed = runner.invoke(app, [*command, "--set", "recipe.optimizer.lr=1e-2"])
    assert changed.exit_code == 2
    assert "come from another recipe" in " ".join(changed.output.split())


NAMED_KEYS = ('task="named-keys"', "recipe.data={named_keys=[1, 2]}")
FACTS = ('task="facts"', "recipe.data={facts=[1, 2]}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["batch_size=0"], "batch_size is 0, required is at least 1"),
        (["num_keys=0"], "num_keys is 0, required is 1 to 90000"),
        (["num_keys=99999"], "num_keys is 99999, required is 1 to 90000"),
        (["num_keys=50000", "overwritten_tokens=[0]"], "num_keys is 100000, required is 1 to 90000"),
        (['filler="no.txt"'], "cannot read 'no.txt'"),
        (["filler_tokens=[-1]"], "filler_lengths is [-1], required are one or more lengths of at least 0"),
        (["filler_tokens=[8, 8]"], "filler_tokens is [8, 8], required are different ones"),
        (['systems=["fam", "fam"]'], "systems is ['fam', 'fam'], required are different ones"),
        (["prefix_tokens=[0, 0]"], "prefix_tokens is [0, 0], required are different ones"),
        (["max_filler_tokens={fam=1}"], "filler_lengths is [], required are one or more lengths"),
        (['systems=["fam", "fam_memory_swapped"]', "batch_size=1"], "gives each text the memory of another"),
        ([NAMED_KEYS[0]], "the recipe trains on 'passkey' (data.task), and the comparison asks for 'named-keys'"),
        ([*NAMED_KEYS, "num_told=[0]"], "num_told is [0], required are one or more numbers of at least 1"),
        ([*NAMED_KEYS, "num_told=[17]"], "num_told is 17 and num_retold 0, required is 1 to 16"),
        ([*NAMED_KEYS, "num_retold=-1"], "num_retold is [-1], required are one or more numbers of at least 0"),
        ([*NAMED_KEYS, "keys_apart=[3, 1]"], "apart is [3, 1], required is 0 <= least <= most"),
        ([*NAMED_KEYS, "num_keys=0"], "num_texts is [0], required are one or more numbers of at least 1"),
        ([*FACTS, "num_supports=[4]"], "num_supports is 4 and num_sentences 10, required is 1 to 3"),
        ([*FACTS, "num_sentences=1"], "num_supports is 2 and num_sentences 1, required is 1 to 3"),
        (["--figure", "a.xyz"], "figure 'a.xyz' ends in '.xyz', required is one of .svg, .png, .pdf"),
        (["--figure", "taken.svg"], "could not write taken.svg: it is not a .svg figure of this package"),
        (["--figure", "small.toml/a.svg"], "could not make the folder small.toml"),
        (["--table", "none/t.md"], "could not write none/t.md: No such file or directory; make its folder"),
        (["--table", "."], "could not write .: it is a folder, required is a file"),
        (["--table", "taken.svg"], "could not write taken.svg: it does not begin with the line"),
    ],
)
def test_what_cannot_be_asked_or_written_is_refused_before_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str
) -> None:
    """Catches an error that comes after hours of training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Schedule, "_run", lambda schedule, run: False)
    (tmp_path / "taken.svg").write_text("my notes")
    if not changes[0].startswith("--"):
        changes = [part for change in changes for part in ("--set", change)]
    fixed = ["--set", 'systems=["fam"]', "--set", "max_filler_tokens={}"]
    result = CliRunner().invoke(app, ["compare", "small.toml", *fixed, *changes])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "runs" / "small" / "fam-0").exists()


def test_filler_of_unknown_words_is_refused_before_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a filler that the trained model turns out not to know."""
    (tmp_path / "manual.txt").write_text("Use option verbose to print more. " * 20)
    comparison = load_comparison(recipe, ['systems=["fam"]', "max_filler_tokens={}", f'filler="{tmp_path}/manual.txt"'])
    monkeypatch.setattr(Trainer, "run", lambda *arguments: pytest.fail("it was trained"))
    with pytest.raises(TransformerFamError, match="of the tokens of the filler manual.txt are words that the tokeni"):
        run_one(comparison, RunName("fam", 0), tmp_path / "runs")


@pytest.mark.usefixtures("short_bytes")
def test_failed_run_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that fails in silence while the others continue."""
    monkeypatch.setattr(schedule, "subprocess", Mock(Popen=Forked))
    folder = tmp_path / "runs"
    (folder / "rmt-0").mkdir(parents=True)
    (folder / "rmt-0" / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    result = CliRunner().invoke(
        app, ["compare", str(recipe), "--output", str(folder), "--set", 'systems=["rmt","full"]']
    )
    assert result.exit_code == 2
    assert "1 runs failed: rmt-0" in " ".join(result.output.split())
    assert "holds a run without its recipe.json" in (folder / "rmt-0" / "run.log").read_text()
    assert "2 empty" in result.output or EMPTY in result.output


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True])
def test_interrupted_comparison_goes_on(recipe: Path, tmp_path: Path, is_killed: bool) -> None:
    """Catches a Ctrl-C, or a killed scheduler, that leaves processes running or loses what they have trained."""
    folder = tmp_path / "runs"
    command = ["compare", str(recipe), "--output", str(folder), "--set", 'systems=["fam"]']
    process = start_in_session(
        tmp_path, [*command, "--set", "max_filler_tokens={}", "--set", "recipe.schedule.steps=100000"]
    )
    said = tmp_path / "said.err"
    log = folder / "fam-0" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    if is_killed:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if is_killed else 130), said.read_text()
    with FileLock(folder / "fam-0" / "run.lock").acquire(timeout=120):  # which its run has let go
        pass
    assert (folder / "fam-0" / "checkpoint.safetensors").exists()
    assert is_killed or "run the same command again to continue" in " ".join(said.read_text().split())


def row(system: str, seed: int, length: int, correct: bool, **more: Any) -> dict[str, Any]:
    common = {"task": "passkey", "model": "small", "version": "1"}
    return common | {"system": system, "seed": seed, "filler_tokens": length, "correct": correct} | more


def test_report_shows_what_is_missing(recipe: Path, tmp_path: Path) -> None:
    """Catches a mean over runs that were never made, and an empty cell that looks like zero."""
    comparison = load_comparison(recipe, ["seeds=[0,1]"])
    rows = [row("fam", 0, 8, True), row("fam", 1, 8, False), row("fam", 0, 40, True), row("rmt", 0, 8, False)]
    found = cells(comparison, rows)
    assert str(found["fam"][8]) == "0.50 [0.00, 1.00]"
    assert str(found["fam"][40]) == "1.00, 1 empty"
    assert str(found["rmt"][40]) == EMPTY
    assert 40 not in found["full"]
    text = shown(comparison_tables(comparison, rows)[0])
    assert "0.50 [0.00, 1.00]" in text
    for seeds, title in (("[0,1]", "mean over 2 seeds [least, most]"), ("[0]", "one seed")):
        of_seeds = load_comparison(recipe, [f"seeds={seeds}"])
        assert str(comparison_tables(of_seeds, rows)[0].title).endswith(title)
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    assert "rmt (1 empty)" in drawn
    assert "empty: full" in drawn
    with pytest.raises(TransformerFamError, match="there are no rows of small"):
        plot_comparison(comparison, [], tmp_path / "figure.svg")
    with pytest.raises(TransformerFamError, match=r"ends in '.gif', required is one of .svg"):
        plot_comparison(comparison, rows, tmp_path / "figure.gif")


def test_terminal_of_80_columns_shows_whole_numbers() -> None:
    """Catches what is cut or left outside, as by several seeds' spread, and one seed's tokens given as all seeds'."""
    comparison = load_comparison(ROOT / "recipes" / "comparisons" / "passkey.toml")
    rows = read_rows([ROOT / "results" / "compare_passkey.jsonl.gz"])
    trained = [row for row in rows if (row["task"], row["system"]) == (TRAINED_TASK, "static_summary")]
    texts = [shown(table, width=80) for table in comparison_tables(comparison, rows)]
    text = "".join(texts)
    assert "…" not in text
    assert all(f" {length:,} " in texts[0] for length in comparison.filler_tokens)
    assert text.count(" fam_norm_bound ") == 3
    assert all(texts[0].count(part) for part in (" fam_gated_memory_ ", " swapped "))
    assert f" {trained[0]['num_parameters']:,} " in text
    assert len({row["num_tokens"] for row in trained}) > 1, "the mean is that of one seed"
    assert f" {mean(row['num_tokens'] for row in trained):,.0f} " in text


def test_ablations_are_drawn_as_a_matrix_and_tables_as_markdown(recipe: Path, tmp_path: Path) -> None:
    """Catches ablations without their name or number, an empty cell that looks like zero, and columns out of line."""
    variants = ",".join(f'{name}="fam"' for name in ("fam_f4", "fam_f8", "a", "b", "c"))
    overrides = ['systems=["fam","fam_f4","fam_f8"]', f"variants={{{variants}}}", "max_filler_tokens={}"]
    comparison = load_comparison(recipe, overrides)
    rows = [row("fam", 0, 8, True), row("fam", 0, 40, False), row("fam_f4", 0, 8, False), row("fam_f4", 0, 8, True)]
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    for text, number in (("1.00", 1), ("0.50", 1), ("0.00", 1), (EMPTY, 3), ("fam_f8", 1)):
        assert drawn.count(f">{text}<") == number, text
    write_markdown(comparison_tables(comparison, rows)[:1], tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text().splitlines()[4:9] == [
        "| system | 8 | 40 |",
        "| --- | ---: | ---: |",
        "| fam | 1.00 | 0.00 |",
        "| fam_f4 | 0.50 | empty |",
        "| fam_f8 | empty | empty |",
    ]


@pytest.mark.usefixtures("short_bytes")
def test_keys_are_asked_at_every_depth_and_behind_another(recipe: Path, tmp_path: Path) -> None:
    """Catches depths in one cell, a run that ends without some of them, and questions evaluated twice after a stop."""
    overrides = ['systems=["fam","rmt"]', "max_filler_tokens={}", "prefix_tokens=[0,9]", "overwritten_tokens=[9]"]
    comparison = load_comparison(recipe, overrides)
    run, path = RunName("fam", 0), tmp_path / "runs" / "fam-0" / "rows.jsonl"
    done: list[tuple[int, int]] = []
    run_one(comparison, run, tmp_path / "runs", lambda what, *share: done.append(share) if what == "ask" else None)
    assert [share for share, _ in done] == sorted(share for share, _ in done)
    assert {total for _, total in done} == {done[-1][0]}
    rows = read_rows([path])
    assert is_finished(comparison, run, rows)
    assert not is_finished(comparison, run, [row for row in rows if "old_key" not in row])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))
    run_one(comparison, run, tmp_path / "runs")
    again = read_rows([path])
    assert [row.get("answer") for row in again] == [row.get("answer") for row in rows]
    for row in rows:
        row["correct"] = "old_key" in row
    shares = [cells(comparison, rows, telling)["fam"][8].mean for telling in comparison.kinds]
    assert shares == [0, 0, 1]
    plot_comparison(comparison, rows, tmp_path / "figure.svg")
    drawn = (tmp_path / "figure.svg").read_text()
    for where in ("0 tokens after the start", "9 tokens after the start", "9 tokens after another key"):
        assert drawn.count(f"given {where}") == 1
    assert len(comparison_tables(comparison, rows)) == 5
    with pytest.raises(RecipeError, match="prefix_tokens and overwritten_tokens are empty or negative"):
        load_comparison(recipe, ["prefix_tokens=[-1]"])


def test_rows_of_two_commits_are_said_in_one_table(recipe: Path) -> None:
    """Catches results of different code in one table without a word of it, and commits of rows left out."""
    comparison = load_comparison(recipe)
    rows = [row("fam", 0, 8, True, git_commit="a" * 40), row("rmt", 0, 8, True, git_commit="b" * 40)]
    rows.append(row("rmt", 9, 8, True, git_commit="c" * 40))
    captions = [str(table.caption) for table in comparison_tables(comparison, rows)]
    assert [caption.partition("; rows of ")[2] for caption in captions] == ["2 commits: aaaaaaaa, bbbbbbbb", "", ""]
    assert "commits" not in str(comparison_tables(comparison, rows[:1])[0].caption)


def test_committed_comparison_is_well_formed() -> None:
    """Catches a shipped recipe that does not load, or a system of the paper that it leaves out."""
    comparison = load_comparison(ROOT / "recipes" / "comparisons" / "passkey.toml")
    assert set(comparison.systems) >= {"fam", "fam_memory_zeroed", "fam_untrained", "static_summary", *RIVAL_NAMES}
    assert len(comparison.seeds) == 3
    assert max(comparison.filler_tokens) >= 262_144
