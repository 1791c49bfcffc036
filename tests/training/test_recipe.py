"""Recipes: what they refuse, and what the shipped ones hold."""

import math
from pathlib import Path

import pytest
from training_recipes import small_recipe, small_values

from transformerfam.errors import RecipeError
from transformerfam.files import parse_toml
from transformerfam.training.optimizer import key_bias_at, lr_factor
from transformerfam.training.recipe.removed import KEYS_OF_STAGES, REMOVED, in_former_keys, without_removed
from transformerfam.training.recipe.sections import KeyBiasSection, OptimizerSection
from transformerfam.training.recipe.toml import apply_override, build_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_read(path):
    """A shipped recipe with a key that the code no longer knows."""
    recipe = load_recipe(path)
    assert recipe.max_filler_tokens <= 512 or path.stem.startswith("own_reader"), "they are for a GPU"


def test_recipe_survives_json():
    """A resumed run whose stored recipe reads back as another one."""
    recipe = small_recipe(
        lora={"rank": 4}, key_bias={"start_value": -4.0, "end_step": 5}, reading={"fam_norm_bound": math.inf}
    )
    assert build_recipe(recipe.to_dict()) == recipe


def in_stage(**data):
    """Return a schedule of one stage with keys of the section `data`."""
    return {"schedule": {"curriculum": [{"filler_tokens": [1, 9], "data": data}]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"learning_rat": 1}}, r"unknown key optimizer.learning_rat in the recipe"),
        ({"optimizer": {"warmup_step": 1}}, r"did you mean optimizer.warmup_steps\?"),
        ({"fam": {"fam_lenght": 4}}, r"did you mean fam.fam_length\?"),
        ({"fam": {"fam_length": 17}}, r"fam_length is 17, required is 0 to block_size"),
        ({"reading": {"num_memory_segments": -1}}, r"reading: num_memory_segments is -1"),
        ({"optimiser": {}}, r"did you mean optimizer\?"),
        ({"model": {"base": 3}}, r"model.base is 3, required is a value of type str"),
        ({"schedule": {"steps": True}}, r"schedule.steps is True, required is a value of type int"),
        ({"schedule": {"curriculum": []}}, r"curriculum is empty"),
        ({"schedule": {"curriculum": [{"filler_tokens": [9, 3]}]}}, r"filler_tokens is \[9, 3\]"),
        ({"schedule": {"curriculum": [{"filler_tokens": [9]}]}}, r"required is a list of 2 values"),
        ({"optimizer": {"schedule": "step"}}, r"required is one of constant, cosine, linear"),
        ({"state_passing": {"ask_later": 0.5}}, r'needs state_passing.rows = "all"'),
        ({"state_passing": {"between_blocks": [3, 1]}}, r"state_passing.between_blocks is \[3, 1\]"),
        ({"state_passing": {"between_steps": -1}}, r"state_passing.between_steps is -1, required is at least 0"),
        ({"schedule": {"repeat_updates": [3, 1]}}, r"schedule.repeat_updates is \[3, 1\]"),
        ({"schedule": {"stored_blocks": -1}}, "schedule.stored_blocks is -1"),
        ({"schedule": {"stored_blocks": 2, "steps_per_stored_block": 0}}, "steps_per_stored_block 0"),
        ({"schedule": {"stored_blocks": 2}, "fam": {"num_memory_segments": 1}}, "no memory segments"),
        ({"schedule": {"stored_blocks": 2}, "fam": {"fam_position": "zero"}}, "a position other than 'zero'"),
        ({"schedule": {"stored_blocks": 2}, "fam": {"fam_layers": [0]}}, "all layers"),
        ({"schedule": {"stored_blocks": 2}, "loss": {"fam_change": 1.0}}, "loss.fam_change = 0"),
        ({"schedule": {"stored_blocks": 2, "gradient_tokens": 60}}, "no schedule.gradient_tokens"),
        ({"schedule": {"repeat_updates": [0, 1]}, "fam": {"num_memory_segments": 1}}, "num_memory_segments is 1"),
        ({"schedule": {"repeat_updates": [0, 1]}, "fam": {"fam_length": 0}}, "there is no FAM to update"),
        ({"fam": {"fam_length": 0}, "state_passing": {"probability": 0.8}}, r"no memory of fixed size to pass"),
        ({"data": {"book": 0.5}}, r"set data.books"),
        ({"loss": {"teacher": 1.0}}, r"required is a base model that was trained before"),
        ({"loss": {"teacher_filler_tokens": [3, 1]}}, r"loss.teacher_filler_tokens is \[3, 1\]"),
        ({"schedule": {"block_sizes": [8, 16]}}, r"block_sizes has 8, required is at least fam.block_size \(16\)"),
        ({"fam": {"fam_key_bias": -4.0}}, r"use the key_bias section"),
        ({"key_bias": {"start_value": -4.0, "end_step": 7}}, r"within the 6 steps"),
        (
            {"model": {"base": "x", "memory": "y", "prompt_text": "z"}},
            r"model.prompt_text is given with model.memory",
        ),
        ({"model": {"prompt_text": "z"}, "fam": {"fam_init": "prefix"}}, r"or fam.fam_init is 'prefix'"),
        ({"lora": 3}, r"lora is 3, required is a section with keys"),
        ({"fam": 3}, r"fam is 3, required is a section with keys"),
        ({"fam": {"fam_copy": False}}, r"unknown key fam.fam_copy in the recipe"),
        ({"fam": {"block_size": "x"}}, r"fam: block_size is 'x', required is an integer"),
        ({"rival": {"sytem": 1}}, r"did you mean rival.system\?"),
        ({"rival": {}}, r"rival: system is missing, required is one of full, rmt"),
        ({"schedule": {"block_sizes": [16, "x"]}}, r"schedule.block_sizes is \[16, 'x'\], .* of type int for each"),
        ({"schedule": {"curriculum": [{"filler": [9, 9]}]}}, r"did you mean schedule.curriculum.0.filler_tokens\?"),
        ({"schedule": {"curriculum": [3]}}, r"schedule.curriculum.0 is 3, required is a section with keys"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"betas is \[0.9, 1.0\], required is at least 0 and below 1 for each"),
        ({"optimizer": {"lr": None}}, r"optimizer.lr is None, required is a value of type float"),
        ({"data": {"few_digits": 10**400}}, r"data.few_digits is 10+, required is a value of type float"),
        ({"model": {"dtype": ["bfloat16"]}}, r"model.dtype is \['bfloat16'\], required is one of float32, bfloat16"),
        ({"instructions": {"files": "a"}}, r"instructions.files is 'a', required is a list"),
        (
            {"data": {"facts": [1, 3], "fact_sentences": [2, 9]}},
            "data.fact_sentences begins at 2 and data.facts ends at 3",
        ),
        (
            {"data": {"facts": [1, 1]}, "schedule": {"gradient_tokens": 9}},
            "gradient_tokens is given and data.task is 'facts'",
        ),
        (
            {"data": {"named_keys": [1, 1]}, "schedule": {"gradient_tokens": 9}},
            "gradient_tokens is given and data.task is",
        ),
        (
            in_stage(short_intro=True),
            r"curriculum\.0\.data has short_intro, which is the same in all stages; set data.short",
        ),
        (in_stage(books="nope"), r"curriculum\.0\.data has books, which is the same in all stages"),
        (in_stage(task="facts"), r"curriculum\.0\.data has task, which is the same in all stages"),
        (in_stage(allow_unknown=True), r"curriculum\.0\.data has allow_unknown, which is the same in all stages"),
        (
            in_stage(fact_filler="a") | {"data": {"facts": [1, 1]}},
            r"curriculum\.0\.data has fact_filler, which is the same",
        ),
        (in_stage(key_digits=[0, 1]), r"schedule\.curriculum\.0: data\.key_digits is \[0, 1\]"),
        (
            {
                "schedule": {
                    "curriculum": [{"filler_tokens": [1, 9], "key_digits": [3, 4], "data": {"key_digits": [5, 5]}}]
                }
            },
            "a stage of the curriculum has key_digits itself and in its data, with another value",
        ),
        (
            {"schedule": {"curriculum": [{"filler_tokens": [1, 9], "key_digits": [3, 4], "data": 3}]}},
            r"schedule\.curriculum\.0\.(data is 3, required is a section|key_digits)",
        ),
        ({"data": 3}, "data is 3, required is a section with keys"),
        (
            {"data": {"task": "fact"}},
            "data.task is 'fact', required is one of passkey, named-keys, worded-keys, passages, facts",
        ),
        ({"data": {"named_kys": [1, 2]}}, "unknown key data.named_kys in the recipe; did you mean data.named_keys"),
        ({"data": {"facts": [1, 2], "few_digits": 0.5}}, "data.few_digits is a key of .*, and the task is 'facts'"),
        ({"no_such_section": {}}, r"unknown key no_such_section in the recipe; known keys are model, schedule"),
    ],
)
def test_wrong_recipe_is_refused_by_name(change, message):
    """A typo that is silently ignored, and a run that trains something else than requested."""
    with pytest.raises(RecipeError, match=message):
        small_recipe(**change)


@pytest.mark.parametrize("values", [3, None, []])
def test_recipe_that_is_no_table_is_refused(values):
    """A file of another program."""
    with pytest.raises(RecipeError, match=r"recipe is .*, required is a section with keys"):
        build_recipe(values)


@pytest.mark.parametrize("dotted", REMOVED)
def test_removed_key_is_refused_with_what_to_do(dotted):
    """A key that was silently dropped, or a message that only calls it unknown."""
    section, name = dotted.split(".")
    with pytest.raises(RecipeError, match=f"key {dotted} of the recipe was removed: .*(leave it out|set|change)"):
        small_recipe(**{section: {name: REMOVED[dotted].default}})


def test_stored_recipe_of_an_earlier_version_is_read():
    """A finished run, or one to resume, that is lost with the keys that a recipe no longer has."""
    recipe = small_recipe()
    values = recipe.to_dict() | {"instructions": None}
    for dotted, removed in REMOVED.items():
        section, name = dotted.split(".")
        if values[section] is not None:
            values[section][name] = 5 if removed.is_free else removed.default
    assert build_recipe(without_removed(values)) == recipe
    values["optimizer"]["final_lr_fraction"] = 0.5
    with pytest.raises(RecipeError, match="key optimizer.final_lr_fraction of the recipe was removed"):
        build_recipe(without_removed(values))


FORMER_DATA = {
    "passkey_sentences": 1.0,
    "passkey_book": 0.0,
    "book": 0.0,
    "books": None,
    "key_digits": [5, 5],
    "few_digits": 0.0,
    "short_intro": False,
    "boundary_share": 0.0,
    "prefix_tokens": [0, 0],
    "named_keys": [0, 0],
    "keys_asked": [1, 1],
    "retold_keys": [0, 0],
    "keys_apart": [0, 0],
    "worded": False,
    "scenes": 0.0,
    "passages": 0.0,
    "mentions": [1, 1],
    "other_numbers": 0.0,
    "facts": [0, 0],
    "facts_asked": [1, 1],
    "fact_sentences": [4, 10],
    "allow_unknown": False,
    "fact_filler": "sentences",
}
"""The section `data` as runs stored it before it had a task."""


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if 'task = "passages"' not in path.read_text()],  # which is younger
    ids=lambda path: path.stem,
)
def test_run_stored_before_data_had_a_task_is_the_same_run(path):
    """A run that cannot be resumed, or rows that count as another recipe's, though no number of it is different."""
    recipe = load_recipe(path)
    stored = recipe.to_dict()
    stored["data"] = FORMER_DATA | {name: value for name, value in stored["data"].items() if name != "task"}
    stored["data"]["worded"] = recipe.data.task == "worded-keys"
    for stage in stored["schedule"]["curriculum"]:
        stage |= dict.fromkeys(KEYS_OF_STAGES) | stage.pop("data")
    assert build_recipe(without_removed(stored)) == recipe

    written = parse_toml(path.read_bytes())
    former = in_former_keys(written)
    assert "task" not in former.get("data", {})
    assert not any("data" in stage for stage in former["schedule"].get("curriculum", []))
    assert in_former_keys(former) == former
    if "data" in former:
        former["data"].pop("worded", None)
    assert build_recipe({**former, "data": {**former.get("data", {}), "task": recipe.data.task}}) == recipe


def test_missing_key_is_named():
    """A recipe without its number of steps."""
    values = small_values()
    del values["schedule"]["steps"]
    with pytest.raises(RecipeError, match=r"missing key schedule.steps"):
        build_recipe(values)


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("optimizer.lr=3e-4", lambda r: r.optimizer.lr, 3e-4),
        ("schedule.steps=9", lambda r: r.schedule.steps, 9),
        ("optimizer.schedule=cosine", lambda r: r.optimizer.schedule, "cosine"),
        ("optimizer.betas=[0.8, 0.9]", lambda r: r.optimizer.betas, (0.8, 0.9)),
        ("schedule.curriculum.1.filler_tokens=[2, 7]", lambda r: r.schedule.curriculum[1].filler_tokens, (2, 7)),
        ("lora.rank=4", lambda r: r.lora.rank, 4),
    ],
)
def test_override_sets_a_dotted_key(override, get, expected):
    """An override that is lost, or that arrives as text."""
    values = small_values()
    apply_override(values, override)
    assert get(build_recipe(values)) == expected


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "model.base.name=3"])
def test_malformed_override_is_refused(override):
    """An override without value or through a value."""
    with pytest.raises(RecipeError, match="override"):
        apply_override(small_values(), override)


def test_unreadable_recipe_is_refused(tmp_path):
    """A traceback of tomllib where a path was mistyped."""
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(RecipeError, match="is not valid TOML"):
        load_recipe(tmp_path / "bad.toml")


def test_key_bias_ends_at_exactly_zero():
    """A bias of -1e-17 that stays in the shipped adapter."""
    section = KeyBiasSection(start_value=-7.3, start_step=3, end_step=10)
    assert key_bias_at(section, 0) == key_bias_at(section, 3) == -7.3
    assert -7.3 < key_bias_at(section, 9) < 0
    assert key_bias_at(section, 10) == key_bias_at(section, 11) == key_bias_at(None, 0) == 0.0


def test_learning_rate_warms_up_and_decays():
    """A schedule that never reaches its full rate, or that decays from the first step."""
    section = OptimizerSection(warmup_steps=4, schedule="cosine", decay_start=10)
    assert lr_factor(section, 0, 20) == 0.25
    assert lr_factor(section, 9, 20) == 1.0
    assert lr_factor(section, 15, 20) == pytest.approx(0.51)
    assert lr_factor(section, 20, 20) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("data", "task"),
    [({"named_keys": [1, 2]}, "named-keys"), ({"named_keys": [1, 2], "scenes": 0.5}, "worded-keys"), ({}, "passkey")],
)
def test_recipe_is_the_same_whether_its_task_is_written_or_not(data, task):
    """Rows that count as another recipe's, since a later version of the file says what the earlier left to be found."""
    written = {
        "data": data | {"task": task},
        "schedule": {"curriculum": [{"data": {"task": task, "key_digits": [3, 3]}}]},
    }
    unwritten = {"data": data, "schedule": {"curriculum": [{"key_digits": [3, 3]}]}}
    assert in_former_keys(written) == in_former_keys(unwritten)
    assert small_recipe(data=data).data.task == task
