"""The ranges of a recipe's numbers, one line each."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from transformerfam.errors import RecipeError
from transformerfam.fields import LARGEST_FLOAT, LARGEST_INTEGER

Range = tuple[Callable[[float], bool], str]

ABOVE_0: Range = (lambda value: value > 0, "above 0")
AT_LEAST_0: Range = (lambda value: value >= 0, "at least 0")
AT_LEAST_1: Range = (lambda value: value >= 1, "at least 1")
SHARE: Range = (lambda value: 0 <= value <= 1, "0 to 1")
DECAY: Range = (lambda value: 0 <= value < 1, "at least 0 and below 1")

RANGES: dict[str, dict[str, Range]] = {
    "model": {
        "num_hidden_layers": AT_LEAST_1,
        "hidden_size": AT_LEAST_1,
        "num_attention_heads": AT_LEAST_1,
        "num_key_value_heads": AT_LEAST_1,
        "intermediate_size": AT_LEAST_1,
        "vocabulary_words": AT_LEAST_1,
        "rope_theta": ABOVE_0,
        "seed": AT_LEAST_0,
    },
    "lora": {"rank": AT_LEAST_1, "alpha": ABOVE_0, "lr": AT_LEAST_0},
    "optimizer": {
        "lr": AT_LEAST_0,
        "prompt_lr": AT_LEAST_0,
        "warmup_steps": AT_LEAST_0,
        "weight_decay": AT_LEAST_0,
        "betas": DECAY,
        "clip_norm": ABOVE_0,
        "decay_start": AT_LEAST_0,
        "final_lr_fraction": SHARE,
        "average_decay": DECAY,
    },
    "schedule": {
        "max_seconds": AT_LEAST_0,
        "checkpoint_seconds": AT_LEAST_0,
        "log_every": AT_LEAST_1,
        "seed": AT_LEAST_0,
        "threads": AT_LEAST_1,
    },
    "stage": {"advance_accuracy": SHARE, "window": AT_LEAST_1, "max_steps": AT_LEAST_1},
    "state_passing": {
        "probability": SHARE,
        "start_step": AT_LEAST_0,
        "start_stage": AT_LEAST_0,
        "start_accuracy": SHARE,
        "ask_later": SHARE,
        "overwrite": SHARE,
        "noise": AT_LEAST_0,
    },
    "key_bias": {"start_step": AT_LEAST_0},
    "data": {
        "passkey_sentences": AT_LEAST_0,
        "passkey_book": AT_LEAST_0,
        "book": AT_LEAST_0,
        "few_digits": SHARE,
        "boundary_share": SHARE,
    },
    "instructions": {
        "prompt_weight": AT_LEAST_0,
        "answer_weight": AT_LEAST_0,
        "repeat_weight": AT_LEAST_0,
    },
    "loss": {
        "key": AT_LEAST_0,
        "other_tokens": AT_LEAST_0,
        "num_other_tokens": AT_LEAST_0,
        "teacher": AT_LEAST_0,
        "diversity": AT_LEAST_0,
        "reconstruction": AT_LEAST_0,
        "fam_change": AT_LEAST_0,
    },
}
"""By section, as a recipe names it (`stage`: of the curriculum), and by field; of a pair both numbers are meant."""

MAY_BE_INFINITE = ("fam_norm_bound",)  # TOML has no null


def require_ranges(recipe: Any) -> None:
    """Refuse numbers of a recipe that are out of their range, or not finite.

    Raises:
        RecipeError: the message names the key, its value and the range.
    """
    for field in dataclasses.fields(recipe):
        section = getattr(recipe, field.name)
        if dataclasses.is_dataclass(section):
            _require_section(field.name, section, RANGES.get(field.name, {}))
    for number, stage in enumerate(recipe.schedule.curriculum):
        _require_section(f"schedule.curriculum.{number}", stage, RANGES["stage"])
    _require_together(recipe)


def _require_together(recipe: Any) -> None:
    """Refuse numbers that leave nothing to train on, or do not divide each other."""
    model, data, start_stage = recipe.model, recipe.data, recipe.state_passing.start_stage
    width, heads, groups = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    loss = dataclasses.asdict(recipe.loss)
    weights = [loss[name] for name in RANGES["loss"] if name != "num_other_tokens"]
    shares = (data.passkey_sentences, data.passkey_book, data.book)
    is_plain = not (data.worded or data.named_keys[1] or data.facts[1])
    for holds, message in (
        (
            model.base != "tiny-random"
            or model.hidden_size % model.num_attention_heads
            == model.num_attention_heads % model.num_key_value_heads
            == 0,
            f"model.hidden_size is {width}, with {heads} heads for {groups} of keys and values, required are numbers "
            "of which each divides the one before",
        ),
        (recipe.instructions is not None or any(weights), "every weight of loss is 0, required is one above 0"),
        (
            recipe.instructions is not None or not is_plain or any(shares),
            "data.passkey_sentences, data.passkey_book and data.book are 0, required is one above 0",
        ),
        (
            recipe.instructions is None or recipe.instructions.prompt_weight or recipe.instructions.answer_weight,
            "instructions.prompt_weight and answer_weight are 0, required is one above 0",
        ),
        (
            start_stage is None or start_stage < max(1, len(recipe.schedule.curriculum)),
            f"state_passing.start_stage is {start_stage}, required is below the number of stages "
            f"({len(recipe.schedule.curriculum)}), which count from 0",
        ),
        (
            recipe.lora is None or len(recipe.lora.targets) > 0,
            "lora.targets is empty, required is at least one name of a linear layer; leave lora out to train all",
        ),
    ):
        if not holds:
            raise RecipeError(message)


def _require_section(where: str, section: Any, ranges: dict[str, Range]) -> None:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        holds, required = ranges.get(field.name, (lambda value: True, "a finite number"))
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            is_finite = abs(number) <= LARGEST_FLOAT or (number == math.inf and field.name in MAY_BE_INFINITE)
            if not is_finite or not holds(number):
                raise RecipeError(f"{where}.{field.name} is {value!r}, required is {required}; change it")
            if isinstance(number, int) and abs(number) > LARGEST_INTEGER:
                raise RecipeError(f"{where}.{field.name} is {value!r}, required is an integer below 2^63; change it")
