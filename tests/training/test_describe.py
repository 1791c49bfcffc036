"""The description of a recipe's keys: as a recipe again, and as the reference page."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_recipes import SMALLEST_TRAINING, small_recipe
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.comparison import load_comparison
from transformerfam.config import FamConfig
from transformerfam.rivals import RivalConfig
from transformerfam.tasks.registry import TASKS
from transformerfam.training.recipe.describe import UNSET, recipe_text, reference_page, toml_value
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.toml import build_recipe, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
COMPARISONS = sorted((ROOT / "recipes" / "comparisons").glob("*.toml"))


def require_round_trip(recipe: Recipe) -> None:
    text = recipe_text(recipe)
    again = build_recipe(tomllib.loads(text))
    assert again == recipe
    assert recipe_text(again) == text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_printed_recipe_is_the_recipe(path: Path) -> None:
    """Catches a key that is printed in another form than `fam train` reads."""
    require_round_trip(load_recipe(path))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_printed_recipe_of_a_comparisons_run_is_the_recipe(path: Path) -> None:
    """Catches a rival's section that is lost."""
    comparison = load_comparison(path)
    for run_name in comparison.runs:
        if run_name.seed == comparison.seeds[0]:
            require_round_trip(comparison.recipe_of(run_name))


def test_printed_recipe_has_what_no_shipped_one_has() -> None:
    """Catches a bound of infinity, a quote in a text and an empty list."""
    require_round_trip(
        small_recipe(
            model={"prompt_text": 'He said: "a\\b\n\x7f\tü\u2028"', "base": "x"},
            key_bias={"start_value": -4.0, "end_step": 5},
            reading={"fam_norm_bound": math.inf},
            optimizer={"lr": 1e-30, "betas": [0.0, 1e-9]},
        )
    )


@given(
    st.one_of(
        st.text(),
        st.floats(allow_nan=False, allow_subnormal=False),
        st.integers(-(2**63), 2**63 - 1),
        st.lists(st.text()),
    )
)
def test_every_value_is_read_back(value: Any) -> None:
    """Catches an escape of JSON that TOML does not have."""
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}


def test_command_prints_every_key_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key without a line of what it means, and a run that begins."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SMALLEST_TRAINING)
    command = ["train", "small.toml", "--print-recipe", "--set", "optimizer.lr=0.5"]
    text = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert not Path("runs").exists()
    lines = text.splitlines()
    optimizer = range(lines.index("[optimizer]"), lines.index("[state_passing]"))
    assert "lr = 0.5" in lines
    for name in small_recipe().to_dict()["optimizer"]:
        (place,) = (i for i in optimizer if lines[i].startswith((f"{name} = ", f"# {name} is not given")))
        assert lines[place - 1].startswith("# ")
    assert "filler_tokens = [1, 9]" in lines
    Path("printed.toml").write_text(text)
    assert load_recipe("printed.toml") == load_recipe("small.toml", ["optimizer.lr=0.5"])


def test_every_key_says_what_it_means() -> None:
    """Catches a field without a string under it."""
    tasks = {name: task.section.model_json_schema() for name, task in TASKS.items()}
    for name, definition in (Recipe.model_json_schema()["$defs"] | tasks).items():
        assert definition["description"], name
        for key, schema in definition["properties"].items():
            assert schema.get("description", "").rstrip().endswith((".", ")")), (name, key)


def test_committed_reference_is_current() -> None:
    """Catches a page that says what the code no longer does."""
    page = reference_page()
    committed = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    assert committed == page, "run scripts/write_recipe_reference.py"
    for kind in (FamConfig, RivalConfig):
        assert all(f"\n- `{field.name}` (" in page for field in dataclasses.fields(kind))
    assert all(len(line) <= 120 for line in page.splitlines())


def keys(values: dict[str, Any]) -> set[str]:
    """Return the keys of a recipe's values, each with the name of its section."""
    stages = values.get("schedule", {}).get("curriculum", [])
    found = {f"{section}.{key}" for section, table in values.items() for key in table}
    found |= {f"data.{key}" for stage in stages for key in stage.get("data", {})}
    return found | {f"schedule.curriculum.{key}" for stage in stages for key in stage}


def test_key_that_no_recipe_sets_has_a_reason() -> None:
    """Catches a field that is kept without use, and a reason for one that is in use."""
    used = {key for path in RECIPES for key in keys(tomllib.loads(path.read_text()))}
    for path in COMPARISONS:
        used |= {key for changes in load_comparison(path).changes.values() for key in changes}
    schema = Recipe.model_json_schema()
    known = {
        f"{section}.{key}"
        for section, field in schema["properties"].items()
        if section not in ("fam", "rival", "data")
        for key in schema["$defs"][json.dumps(field).partition("$defs/")[2].partition('"')[0]]["properties"]
    } | {f"schedule.curriculum.{key}" for key in schema["$defs"]["Stage"]["properties"]}
    known |= {f"data.{key}" for task in TASKS.values() for key in task.section.model_fields}
    assert known - used == set(UNSET)
