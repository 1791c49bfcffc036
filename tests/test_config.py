"""Values of configurations and recipes have their types and ranges, or are refused by name."""

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from training_recipes import small_recipe

from transformerfam import FamConfig
from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.rivals import RivalConfig
from transformerfam.tasks.ranges import range_of
from transformerfam.tasks.registry import TASKS
from transformerfam.tasks.section import Section
from transformerfam.tasks.writing import TaskSection, load_books
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.sections import Stage
from transformerfam.training.tiny import build_tiny_tokenizer

WRONG: dict[type, list[Any]] = {
    bool: [3, 0, 1.0, "False", None],
    int: [2.5, 4.0, True, "8", 2**70],
    float: [math.nan, -math.inf, 1e39, True, "0.5"],
    str: ["no such word", 3, None, ["gated"]],
}


def wrong_values(config: Any, name: str) -> list[Any]:
    """Return values of other types than a field's; of one that may be None those of its other type."""
    kinds = {"window": int, "recurrent_layer": int, "fam_norm_bound": float}
    value = getattr(config, name)
    if name == "fam_layers":
        return [(0.0, 1), ("0",), 3, "01", (True,)]
    wrong = WRONG[kinds.get(name, type(value))]
    return [one for one in wrong if not (name in kinds and one is None)]


@pytest.mark.parametrize("config", [FamConfig(), RivalConfig(system="rmt")], ids=["fam", "rival"])
def test_value_of_another_type_is_refused_by_name(config: Any) -> None:
    """Catches a flag that is a word, a length with a fraction, a number that is not a number."""
    kind = type(config)
    for field in dataclasses.fields(config):
        for wrong in wrong_values(config, field.name):
            with pytest.raises(TransformerFamError, match=f"^{field.name} is .*required is"):
                kind(**config.to_dict() | {field.name: wrong})


def test_flag_of_former_name_is_a_flag() -> None:
    """Catches `--set fam_copy=False`, whose value is a word that counts as true."""
    assert FamConfig(fam_copy=False).fam_query == "initial"
    for wrong in ("False", 0, 1.0):
        with pytest.raises(TransformerFamError, match="fam_copy is .*required is True or False"):
            FamConfig(fam_copy=wrong)


def test_whole_numbers_serve_where_a_fraction_may_be() -> None:
    assert FamConfig(fam_key_bias=-8, fam_norm_bound=math.inf, fam_layers=[0, 2]).fam_layers == (0, 2)


OUT_OF_RANGE = {
    "above 0": (0, -1),
    "at least 0": (-1,),
    "at least 1": (0,),
    "0 to 1": (-0.1, 1.5),
    "at least 0 and below 1": (-0.1, 1.0),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {}, "model": {"base": "smollm2"}},
    "key_bias": {"key_bias": {"start_value": -8.0, "end_step": 4}},
    "instructions": {"instructions": {"files": ["a"], "length": 600}, "schedule": {"curriculum": []}},
    "evaluation": {"evaluation": {"every": 2, "questions": "a"}},
}


REQUIRED: dict[str, dict[str, Any]] = {
    "passkey": {},
    "named-keys": {"named_keys": [1, 2]},
    "worded-keys": {"named_keys": [1, 2]},
    "facts": {"facts": [1, 2]},
    "passages": {"questions": ["a"], "texts": ["b"]},
}
"""Keys without which a task's section cannot be built."""


def sections() -> dict[str, type[Section]]:
    """Return the classes of a recipe's sections by name; those of FAM and of a rival check themselves."""
    found: dict[str, type[Section]] = {"stage": Stage} | {f"data {name}": task.section for name, task in TASKS.items()}
    for name, field in Recipe.model_fields.items():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section) and kind is not TaskSection:
                found[name] = kind
    return found


RANGES = {
    section: {name: words for name, field in kind.model_fields.items() if (words := range_of(field)) is not None}
    for section, kind in sections().items()
}
"""By section and field."""
FLOATS = {name for kind in sections().values() for name, field in kind.model_fields.items() if "float" in str(field)}


def recipe_with(section: str, name: str, value: Any) -> Any:
    sections = {key: dict(values) for key, values in SECTIONS.get(section, {}).items()}
    section, _, task = section.partition(" ")
    if task:
        sections["data"] = REQUIRED[task] | {"task": task, name: value}
    elif section == "stage":
        sections["schedule"] = {"curriculum": [{"filler_tokens": [1, 30], name: value}]}
    else:
        sections[section] = sections.get(section, {}) | {name: value}
    return small_recipe(**sections)


def test_integer_that_torch_cannot_hold_is_refused_by_name() -> None:
    """Catches a number whose error is torch's, or that is read for hours."""
    for section, values in {"model": {"hidden_size": 2**70}, "schedule": {"block_sizes": [8, 2**63]}}.items():
        with pytest.raises(RecipeError, match=rf"{section}\.\w+ is .*required is an integer below 2\^63"):
            small_recipe(**{section: values})


def test_every_number_has_its_range() -> None:
    """Catches a range that is lost with the type that has it."""
    assert sum(map(len, RANGES.values())) == 67
    assert RANGES["optimizer"]["betas"] == "at least 0 and below 1"
    assert RANGES["lora"]["lr"] == "at least 0"


@pytest.mark.parametrize("section", [name for name, fields in RANGES.items() if fields])
def test_number_out_of_range_is_refused_by_name(section: str) -> None:
    """Catches a training that goes uphill, drops a loss or keeps weights that are no numbers."""
    for name, required in RANGES[section].items():
        for value in (*OUT_OF_RANGE[required], math.nan, math.inf, 1e39, 2**2000):
            number = float(value) if name in FLOATS and abs(value) < 2**1000 else value
            given = [number, 0.5] if name == "betas" else number
            where = "schedule" if section == "stage" else section.split()[0]
            with pytest.raises(RecipeError, match=rf"{where}\..*{name} is"):
                recipe_with(section, name, given)


TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to predict": ({"loss": {"key": 0.0, "other_tokens": 0.0}}, "every weight of loss is 0"),
    "nothing to read": ({"data": {"passkey_sentences": 0.0}}, "data.passkey_sentences, .* are 0"),
    "heads that do not divide": ({"model": {"num_attention_heads": 3}}, "model.hidden_size is 32, with 3 heads"),
    "a stage that is not there": ({"state_passing": {"start_stage": 2}}, "start_stage is 2, required is below"),
    "no layer": ({"lora": {"targets": []}, "model": {"base": "smollm2"}}, "lora.targets is empty"),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_numbers_that_leave_nothing_to_train_are_refused(name: str) -> None:
    sections, match = TOGETHER[name]
    with pytest.raises(RecipeError, match=match):
        small_recipe(**sections)


def test_empty_books_are_refused(tmp_path: Path) -> None:
    """Catches a book without a word, on which a training runs to its end."""
    (tmp_path / "empty.txt").write_text("\n \n\n")
    with pytest.raises(RecipeError, match=r"data.books is .* whose \.txt files are empty"):
        load_books(build_tiny_tokenizer(), tmp_path)
