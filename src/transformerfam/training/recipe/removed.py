"""Keys that recipes once had: what each was fixed to, and what to do where a recipe still has one."""

from typing import Any, NamedTuple

from transformerfam.errors import RecipeError
from transformerfam.tasks.registry import TASKS, task_of_keys


class Removed(NamedTuple):
    """A key that is gone."""

    remedy: str
    """What to do."""
    default: Any
    """The value that its recipes are trained by now."""
    is_free: bool = False
    """Whether no value of it changes a number of a run."""


REMOVED = {
    "model.vocabulary_words": Removed("the vocabulary has the 2,000 most frequent words; leave it out", 2000),
    "optimizer.final_lr_fraction": Removed("the learning rate decays to 0.02 of itself; leave it out", 0.02),
    "schedule.log_every": Removed("every step is logged; leave it out", 1, is_free=True),
    "state_passing.start_accuracy": Removed("set start_step or start_stage in its place", None),
    "instructions.prompt_weight": Removed("prompts weigh 0; leave it out", 0.0),
    "instructions.answer_weight": Removed("answers weigh 1; change repeat_weight, which is relative to it", 1.0),
    "instructions.repeat_prompt": Removed("it is always the paper's; leave it out", "[repeat random segment]:"),
    "data.worded": Removed('set data.task = "worded-keys"', False),
    "reading.num_sink_tokens": Removed("train with fam.num_sink_tokens, or leave it out", None),
}
"""By section and key."""


KEYS_OF_STAGES = ("prefix_tokens", "named_keys", "key_digits", "facts", "fact_sentences")
"""Keys that a stage of the curriculum once had itself, and has in its `data` now."""
OFF = {"named_keys": [0, 0], "facts": [0, 0]}
"""Values with which sections `data` that had the keys of all tasks marked a task that is not theirs."""


def with_keys_in_data(stage: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stage with the keys of `KEYS_OF_STAGES` in its `data`; the argument stays as it is."""
    former = {name: stage[name] for name in KEYS_OF_STAGES if stage.get(name) is not None}
    kept = {name: value for name, value in stage.items() if name not in KEYS_OF_STAGES}
    data = kept.get("data", {})
    if not former or not isinstance(data, dict):
        return kept
    both = [name for name in former if name in data and data[name] != former[name]]
    if both:
        raise RecipeError(
            f"a stage of the curriculum has {both[0]} itself and in its data, with another value; leave the first out"
        )
    return kept | {"data": former | data}


def in_former_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return plain values of a recipe as before `data` had a task and stages a `data`; the argument stays as it is.

    Recipes that say the same in either way give the same, by which rows are known whose recipe was written in the
    former one.
    """
    kept = dict(recipe)
    data = kept.pop("data", {})
    if isinstance(data, dict):
        flag = {"worded": True} if data.get("task", task_of_keys(data)) == "worded-keys" else {}
        data = {name: value for name, value in data.items() if name != "task"} | flag
    if data:
        kept["data"] = data
    schedule = kept.get("schedule")
    if isinstance(schedule, dict) and isinstance(schedule.get("curriculum"), list):
        stages = []
        for stage in schedule["curriculum"]:
            if isinstance(stage, dict) and isinstance(stage.get("data", {}), dict):
                own = {name: value for name, value in stage.get("data", {}).items() if name != "task"}
                stage = {name: value for name, value in stage.items() if name != "data"} | own
            stages.append(stage)
        kept["schedule"] = schedule | {"curriculum": stages}
    return kept


def of_one_task(data: dict[str, Any]) -> dict[str, Any]:
    """Return a stored section `data`, which had the keys of all tasks, with those of its task; both stay as they are.

    A key of another task is left out where it has the value by which that task was off, or any other that nothing read.
    """
    if "task" in data or not data.keys() & {"worded", *OFF}:
        return data
    is_on = {name: list(data.get(name, off)) != off for name, off in OFF.items()}
    keys = "worded-keys" if data.get("worded") else "named-keys"
    task = keys if is_on["named_keys"] else "facts" if is_on["facts"] else "passkey"
    known = TASKS[task].section.model_fields
    return {"task": task} | {name: value for name, value in data.items() if name in known}


def without_removed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stored recipe without the removed keys that say what is fixed now.

    Args:
        values: plain values, as an earlier version wrote them; they stay as they are.
    """
    kept = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    if isinstance(kept.get("data"), dict):
        kept["data"] = of_one_task(kept["data"])
    for dotted, removed in REMOVED.items():
        section, _, name = dotted.partition(".")
        keys = kept.get(section)
        if isinstance(keys, dict) and name in keys and (removed.is_free or keys[name] == removed.default):
            del keys[name]
    return kept
