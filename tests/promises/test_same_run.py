"""Resume means the same run: what may change, what may not, and what to do where there is nothing to resume."""

import json
import shlex
import shutil
import signal

import pytest
from command_line import run
from tiny_models import save_passkey_model
from training_recipes import SMALL_COMPARISON as SMALL
from training_recipes import SMALLEST_TRAINING as RECIPE
from training_recipes import small_recipe

from transformerfam.comparison import RunName, load_comparison, run_one
from transformerfam.comparison import run as comparison_run
from transformerfam.comparison.report import current_rows
from transformerfam.comparison.run import ROWS_FILE, TRAINED_TASK, is_finished, recipe_digest, require_same_recipe
from transformerfam.comparison.schedule import Schedule
from transformerfam.errors import CorruptFileError, RecipeError, StateMismatchError
from transformerfam.reports.accuracy import accuracy_by_length
from transformerfam.reports.rows import RowFile, read_rows
from transformerfam.tasks.facts import words
from transformerfam.training import trainer as trainer_module
from transformerfam.training.run_folder import FREE_TO_CHANGE
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


@pytest.mark.parametrize("change", [{"steps": 2}, {"max_seconds": 99.0}, {"checkpoint_seconds": 1.0}, {"threads": 1}])
def test_steps_time_and_threads_may_change(tmp_path, change):
    """Would catch a run that cannot be made longer, or resumed on another machine."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    Trainer(small_recipe(schedule={"steps": 1} | change), tmp_path, resume=True)


def test_run_of_an_earlier_version_is_resumed(tmp_path):
    """Would catch a run that ends with the version that started it."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    stored = json.loads((tmp_path / "recipe.json").read_text())
    stored["optimizer"]["final_lr_fraction"], stored["schedule"]["log_every"] = 0.02, 5
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    Trainer(small_recipe(schedule={"steps": 2}), tmp_path, resume=True).run()
    stored["optimizer"]["final_lr_fraction"] = 0.5
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    with pytest.raises(CorruptFileError, match="optimizer.final_lr_fraction of the recipe was removed"):
        Trainer(small_recipe(schedule={"steps": 3}), tmp_path, resume=True)


@pytest.fixture
def run_on_files(tmp_path):
    """Start a run that reads files of every kind, and return its recipe and its folder."""
    text = "".join(f" {word}" for word in words()) + "."
    (tmp_path / "books").mkdir()
    for name in ("books/a.txt", "filler.txt", "words.txt"):
        (tmp_path / name).write_text(text + " The grass is green." * 50)
    save_passkey_model(tmp_path / "base")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "The grass is green. " * 20}) + "\n")

    def start(kind):
        files = {
            "books": {"data": {"books": str(tmp_path / "books"), "passkey_book": 1.0}},
            "facts": {"data": {"facts": (1, 1), "fact_filler": str(tmp_path / "filler.txt")}},
            "words": {"model": {"vocabulary_from": str(tmp_path / "words.txt")}},
            "base": {"model": {"base": str(tmp_path / "base")}},
            "lines": {"instructions": {"files": [str(tmp_path / "lines.jsonl")], "length": 600}},
        }[kind]
        more = {"schedule": {"steps": 1} | ({"curriculum": []} if kind == "lines" else {})}
        recipe = small_recipe(**files | more)
        Trainer(recipe, tmp_path / "run").run()
        return recipe, tmp_path / "run"

    return start


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("books", "books/a.txt", "data.books/a.txt was changed"),
        ("books", "books/b.txt", "data.books/b.txt is new"),
        ("facts", "filler.txt", "data.fact_filler was changed"),
        ("words", "words.txt", "model.vocabulary_from was changed"),
        ("base", "base/model.safetensors", "model.base/model.safetensors was changed"),
        ("base", "base/tokenizer.json", "model.base/tokenizer.json was changed"),
        ("lines", "lines.jsonl", "instructions.files.0 was changed"),
    ],
)
def test_run_is_not_resumed_on_other_files(run_on_files, tmp_path, kind, file, name):
    """Would catch a run that is half of one text, or of one base model, and half of another."""
    recipe, folder = run_on_files(kind)
    Trainer(recipe, folder, resume=True)
    path = tmp_path / file
    before = path.read_bytes() if path.exists() else None
    path.write_bytes((before or b" The sky is blue.") + b"\n")
    with pytest.raises(RecipeError, match=f"read other files than there are now: {name} .SHA-256 .*; put back"):
        Trainer(recipe, folder, resume=True)
    if before is not None:
        path.unlink()
        with pytest.raises(RecipeError, match=name.replace("was changed", "is missing")):
            Trainer(recipe, folder, resume=True)


def test_run_of_an_earlier_version_is_resumed_with_a_warning(run_on_files):
    """Would catch runs that cannot be resumed after an update, and a check that is left out without a word."""
    recipe, folder = run_on_files("facts")
    values = json.loads((folder / "recipe.json").read_text())
    assert values.pop("sources")
    (folder / "recipe.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="did not note its files; it is not checked whether data.fact_filler and"):
        Trainer(recipe, folder, resume=True)
    Trainer(recipe, folder, resume=True)  # which has noted them


def test_run_without_its_recipe_is_not_resumed(tmp_path):
    """Would catch a checkpoint that resumes with any recipe once recipe.json is gone."""
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path).run()
    before = (tmp_path / "recipe.json").read_text()
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(RecipeError, match="holds a run without its recipe.json, .*; put that file back, or train into"):
        Trainer(small_recipe(schedule={"steps": 1}), tmp_path, resume=True)
    (tmp_path / "recipe.json").write_text(before)
    Trainer(small_recipe(schedule={"steps": 1}), tmp_path, resume=True)


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
    command = shlex.split(text[text.index("resume with: fam train") :].removeprefix("resume with: fam "))
    assert command[:3] == ["train", str(recipe), "--resume"]
    assert "3 steps" in run(*command)


def test_run_that_was_killed_before_its_first_checkpoint_starts_over(tmp_path, monkeypatch):
    """Would catch a remedy that is none, and steps that are in the log twice."""
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
    run_one(comparison("recipe.schedule.checkpoint_seconds=1.0"), name, tmp_path / "runs")


@pytest.mark.parametrize("key", FREE_TO_CHANGE)
def test_rows_of_a_comparison_are_of_its_recipe_whatever_changes_no_number(comparison, key):
    """Would catch a finished comparison that another machine's number of threads makes another one."""
    plans = [comparison(f"recipe.schedule.{key}=1"), comparison(f"recipe.schedule.{key}=2"), comparison()]
    plans.append(comparison(f'changes={{fam={{"schedule.{key}"=3}}}}', "allow_different_budgets=true"))
    name = RunName("fam", 0)
    common = {"task": TRAINED_TASK, "system": "fam", "seed": 0, "model": "small"}
    for plan in plans:
        require_same_recipe(plan, [common | {"recipe_digest": recipe_digest(plans[0], name)}])
        require_same_recipe(plan, [common | {"recipe_digest": recipe_digest(plan, name, is_whole=True)}])
        with pytest.raises(RecipeError, match="the rows of fam-0 come from another recipe"):
            require_same_recipe(
                comparison("recipe.optimizer.lr=0.5"), [common | {"recipe_digest": recipe_digest(plan, name)}]
            )


def test_rows_of_a_run_on_another_text_are_refused(comparison, tmp_path):
    """Would catch a finished comparison that shows runs of a text that was edited since as its own."""
    (tmp_path / "words.txt").write_text("The grass is green.")
    plan = comparison('systems=["fam_untrained"]', f'recipe.model.vocabulary_from="{tmp_path}/words.txt"')
    run_one(plan, plan.runs[0], tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / "fam_untrained-0" / ROWS_FILE])
    require_same_recipe(plan, rows)
    (tmp_path / "words.txt").write_text("The grass is not green.")
    with pytest.raises(RecipeError, match="model.vocabulary_from was changed"):
        require_same_recipe(plan, rows)
    require_same_recipe(plan, [{n: v for n, v in row.items() if n != "sources"} for row in rows])


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


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """Finish one run of each task, and return its comparison file and rows by task."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "filler.txt").write_text(" The grass is green. The sky is blue." * 9)
    data = {
        "named-keys": ("named_keys = [1, 3]", "num_told = [2]\n"),
        "facts": ("facts = [1, 2]", "num_supports = [1]\nnum_sentences = 6\n"),
        "passkey": ("", ""),
    }
    found = {}
    for task, (line, keys) in data.items():
        (folder / f"{task}.recipe").write_text(f"{SMALL_TRAINING}[data]\n{line}\n")
        path = folder / f"{task}.toml"
        path.write_text(
            f'recipe = "{task}.recipe"\ntask = "{task}"\nfiller = "{folder}/filler.txt"\nsystems = ["fam_untrained"]\n'
            f"num_keys = 2\nfiller_tokens = [8]\n{keys}"
        )
        plan = load_comparison(path)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(comparison_run, "BYTES_LENGTHS", (8,))
            run_one(plan, plan.runs[0], folder / "runs")
        found[task] = (path, read_rows([folder / "runs" / "fam_untrained-0" / ROWS_FILE]))
        shutil.rmtree(folder / "runs")
    return found


@pytest.mark.parametrize(
    ("task", "change", "num_kept"),
    [
        ("passkey", 'filler="sentences"', 0),
        ("passkey", "prefix_tokens=[9]", 0),
        ("passkey", "overwritten_tokens=[0]", 2),
        ("passkey", "num_keys=3", 0),
        ("passkey", "num_keys=1", 0),
        ("passkey", "filler_tokens=[9]", 0),
        ("passkey", "recipe.fam.block_size=8", 0),
        ("named-keys", 'filler="sentences"', 0),
        ("named-keys", "num_told=[1]", 0),
        ("named-keys", "num_retold=1", 0),
        ("named-keys", "keys_apart=[1,2]", 0),
        ("facts", 'filler="sentences"', 0),
        ("facts", "num_supports=[2]", 0),
        ("facts", "num_sentences=7", 0),
    ],
)
def test_answers_to_other_questions_are_neither_shown_nor_counted(finished_runs, task, change, num_kept):
    """Would catch old answers under a changed comparison, and no new evaluation."""
    path, rows = finished_runs[task]
    (run,) = load_comparison(path).runs
    assert is_finished(load_comparison(path), run, rows)
    other = load_comparison(path, [change])
    assert not is_finished(other, run, rows)
    assert sum(row["task"] == task for row in current_rows(other, rows)) == num_kept


@pytest.mark.parametrize("task", ["passkey", "named-keys", "facts"])
def test_filler_of_the_same_name_with_another_text_is_asked_again(finished_runs, task):
    """Would catch answers in a text that was edited since; rows of earlier versions do not say which text it was."""
    path, rows = finished_runs[task]
    plan, filler = load_comparison(path), path.with_name("filler.txt")
    before = filler.read_text()
    filler.write_text(before.replace("green", "blue"))
    assert not is_finished(plan, plan.runs[0], rows)
    old = [{name: value for name, value in row.items() if name != "questions"} for row in rows]
    assert is_finished(plan, plan.runs[0], old)
    filler.write_text(before)


def test_question_of_a_changed_comparison_is_asked_in_its_old_folder(comparison, tmp_path):
    """Would catch a run that is not evaluated since its folder holds as many answers to other questions."""
    name = RunName("fam_untrained", 0)
    run_one(comparison(), name, tmp_path / "runs")
    changed = comparison("prefix_tokens=[5]")
    run_one(changed, name, tmp_path / "runs")
    rows = read_rows([tmp_path / "runs" / str(name) / ROWS_FILE])
    assert is_finished(changed, name, rows)
    assert {row["prefix_tokens"] for row in current_rows(changed, rows) if row["task"] == "passkey"} == {5}


@pytest.mark.parametrize("change", ["--no-jitter", "--wording", "--filler"])
def test_other_questions_are_not_asked_into_the_same_file(folder, tmp_path, change):
    """Would catch answers without jitter, or to other sentences, shown as those with it."""
    (tmp_path / "w.toml").write_text(
        'intro = "There is {key}."\nquestion = " What is it?"\nanswer = " The key is {key}"\n'
    )
    (tmp_path / "f.txt").write_text(" The grass is green. Here we go." * 5)
    command = ["evaluate", "passkey", "--filler-tokens", "9", "--num-keys", 2, "--model", folder]
    command += ["--output", tmp_path / "rows.jsonl", "--wording", tmp_path / "w.toml", "--filler", tmp_path / "f.txt"]
    run(*command)
    run(*command)
    if change == "--wording":
        (tmp_path / "w.toml").write_text((tmp_path / "w.toml").read_text().replace("What is it", "What is the key"))
    elif change == "--filler":
        (tmp_path / "f.txt").write_text(" The sky is blue." * 5)
    else:
        command.append(change)
    text = run(*command, status=2)
    assert "answer other questions" in text
    assert "write the new answers to another file" in text


def test_rows_of_different_questions_are_not_pooled():
    """Would catch one curve of two wordings of one name."""
    row = {"task": "passkey", "system": "fam", "model": "m", "filler_tokens": 9, "correct": True}
    accuracy_by_length([row, row | {"questions": "a"}])
    with pytest.raises(StateMismatchError, match="answer different questions, .* .a and b.; report them apart"):
        accuracy_by_length([row | {"questions": "a"}, row | {"questions": "b"}])
