"""What the keys of a recipe mean: a recipe as TOML with comments, and the reference page docs/reference/recipes.md.

Types, ranges, defaults and meanings are those of the sections' own JSON schema.
"""

import dataclasses
import json
import math
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from transformerfam.config import FamConfig
from transformerfam.tasks.ranges import range_in_words
from transformerfam.tasks.registry import TASKS
from transformerfam.training.recipe.configurations import OPEN_MEMORY
from transformerfam.training.recipe.recipe import Recipe

WIDTH = 120
TABLES = {"curriculum": "Stage"}
"""Keys whose value is a list of tables, with the class of these."""
TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "object": "table"}
BOUNDS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le", "exclusiveMaximum": "lt"}

UNSET = {
    "model.num_hidden_layers": "belongs to the shape of `tiny-random`; tests train smaller ones",
    "model.num_attention_heads": "as `model.num_hidden_layers`",
    "model.num_key_value_heads": "as `model.num_hidden_layers`",
    "model.seed": "`fam compare` sets it for each of its seeds",
    "lora.targets": "models with fused layers have other names, as `qkv_proj` and `gate_up_proj`",
    "lora.fused": "`false` is PEFT's own way, which [speed](../results/speed.md) compares it with",
    "schedule.accumulate": "the same step in less memory, see [fine-tuning](../howto/fine_tune.md)",
    "schedule.shard": "models that one GPU does not hold, see [fine-tuning](../howto/fine_tune.md)",
    "state_passing.noise": "measured with the tiny memory, which then recalled more at 4,096 tokens and less at 16,384",
    "key_bias.start_value": "lets a closed memory open slowly, see [choices](../explanation/choices.md)",
    "key_bias.start_step": "as `key_bias.start_value`",
    "key_bias.end_step": "as `key_bias.start_value`",
    "data.allow_unknown": "what to set where a text is refused since the tokenizer knows next to no word of it",
    "loss.attention_outputs": "the base model then reads in every step, see [instructions](../howto/training.md)",
    "evaluation.questions": "held-out questions of one's own, see [training on instructions](../howto/training.md)",
    "loss.key": "what the other weights are relative to; 0 trains on text alone",
    "loss.fam_change": "measured with the tiny memory, which changed less with it and held no longer",
}
"""Keys that no recipe or comparison of the repository sets, and why they are there."""

INTRODUCTION = """\
# Recipes

<!-- Written by scripts/write_recipe_reference.py from the package; change the text there. -->

A recipe is a TOML file with these sections. `fam train RECIPE --print-recipe` prints every key of one with its value
and its meaning, as a recipe that trains the same; `--set SECTION.KEY=VALUE` changes a key. A key or a value that is not
listed here is refused, with the nearest key that is. A key is listed as: `key` (type, range; default). None means that
the key is left out. `data.task` says which keys the section `data` has; without it, it is the first of the tasks that
has the most of the keys which are given.
"""


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as TOML with all its keys, each under a line of what it means; `load_recipe` reads it back."""
    lines = ["# All keys of a recipe. Those that are not given have no value."]
    for name, values in recipe.model_dump().items():
        kind = type(recipe.data).__name__ if name == "data" else _kind_of(_schema()["properties"][name])
        about = _sentence(_definition(kind)["description"] if name == "data" else _about(name))
        if values is None:
            lines += ["", f"# [{name}] is not given: {about}"]
            continue
        lines += ["", f"# {about}", f"[{name}]"]
        lines += _keys(kind, {key: value for key, value in values.items() if key not in TABLES})
        for key in TABLES.keys() & values.keys():
            for number, table in enumerate(values[key]):
                lines += ["", *([] if number else [f"# {_meaning(kind, key)}"]), f"[[{name}.{key}]]"]
                lines += _keys(TABLES[key], table, is_explained=number == 0)
    return "\n".join(lines) + "\n"


def reference_page() -> str:
    """Return docs/reference/recipes.md."""
    parts = [INTRODUCTION]
    for name, schema in _schema()["properties"].items():
        if name == "data":
            for task, parts_of_task in TASKS.items():
                section = parts_of_task.section
                about = str(_definition(section.__name__)["description"])
                parts += _reference(f'[data] with task = "{task}"', about, section.__name__, {})
            continue
        kind = _kind_of(schema)
        parts += _reference(f"[{name}]", _about(name), kind, OPEN_MEMORY if name == "fam" else {})
        if name == "schedule":
            parts += _reference("[[schedule.curriculum]]", _definition("Stage")["description"], "Stage", {})
    parts.append("## Keys that no recipe of the repository sets\n")
    parts.append("| key | why it is there |\n|---|---|")
    parts += [f"| `{key}` | {reason} |" for key, reason in UNSET.items()]
    return "\n".join(parts) + "\n"


def _reference(title: str, about: str, kind: str, defaults: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a section: what it is, and its keys."""
    definition = _definition(kind)
    yield f"## `{title}`\n"
    yield _wrapped(about) + "\n"
    for key in _names(kind):
        schema = definition["properties"][key]
        said = _type(schema)
        if key in definition.get("required", ()):
            said += "; required"
        elif (default := defaults.get(key, schema.get("default"))) is not None:
            said += f"; `{toml_value(default)}`"
        yield _wrapped(f"- `{key}` ({said}): {schema['description']}", "  ")
    yield ""


def _keys(kind: str, values: dict[str, Any], is_explained: bool = True) -> Iterator[str]:
    """Yield the lines of a table's keys."""
    for key, value in values.items():
        if is_explained:
            yield f"# {_meaning(kind, key)}"
        if value is not None:
            yield f"{key} = {toml_value(value)}"
        elif is_explained:
            yield f"# {key} is not given"


def toml_value(value: Any) -> str:
    """Return a number, text, flag, list or table as TOML."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(one)}' for key, one in value.items())} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


@cache
def _definitions() -> dict[str, Any]:
    """Return the schema of every section, those of all tasks among them."""
    tasks = (task.section for task in TASKS.values())
    return _schema()["$defs"] | {section.__name__: section.model_json_schema() for section in tasks}


def _definition(kind: str) -> dict[str, Any]:
    definition: dict[str, Any] = _definitions()[kind]
    return definition


def _names(kind: str) -> list[str]:
    """Return the keys of a section; former names of a configuration's fields are none."""
    properties = list(_definition(kind)["properties"])
    if kind != FamConfig.__name__:
        return properties
    return [field.name for field in dataclasses.fields(FamConfig)]


def _kind_of(schema: dict[str, Any]) -> str:
    """Return the class of the section that a schema refers to."""
    parts = [schema, *schema.get("anyOf", ()), *schema.get("allOf", ())]
    return next(str(part["$ref"]) for part in parts if "$ref" in part).rpartition("/")[2]


def _about(name: str) -> str:
    """Return what a section is: what the recipe says of it, or else its class."""
    schema = _schema()["properties"][name]
    return str(schema.get("description") or _definition(_kind_of(schema))["description"])


def _meaning(kind: str, key: str) -> str:
    return _sentence(_definition(kind)["properties"][key]["description"])


def _sentence(text: str) -> str:
    """Return the first sentence of a text, on one line."""
    found = re.match(r".*?(?<!\.)\.(?= [^a-z.]|$)", " ".join(text.split()))
    return found.group() if found else " ".join(text.split())


def _wrapped(text: str, indent: str = "") -> str:
    """Return a paragraph in lines; code is not broken, so that no line begins with its minus, as a list would."""
    whole = re.sub(r"`[^`]*`", lambda code: code.group().replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.wrap(whole, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def _type(schema: dict[str, Any]) -> str:
    """Say a key's type and range."""
    if "anyOf" in schema:
        return _type(next(part for part in schema["anyOf"] if part.get("type") != "null"))
    if "enum" in schema:
        *most, last = (f"`{toml_value(one)}`" for one in schema["enum"])
        return f"{', '.join(most)} or {last}"
    if "const" in schema:
        return f"`{toml_value(schema['const'])}`"
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        if "$ref" in items[0]:
            return "tables, see below"
        item, _, bounds = _type(items[0]).partition(", ")
        number = f"{len(items)} " if "prefixItems" in schema else ""
        return f"list of {number}{item}s" + (f", each {bounds}" if bounds else "")
    words = range_in_words({name: schema[bound] for bound, name in BOUNDS.items() if bound in schema})
    return TYPES[schema["type"]] + (f", {words}" if words else "")
