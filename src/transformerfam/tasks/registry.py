"""All tasks by name."""

import pkgutil
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformerfam.tasks.facts_training import FactsSection, FactsWriter
from transformerfam.tasks.named_keys_training import NamedKeysSection, NamedKeysWriter
from transformerfam.tasks.passages_training import PassagesSection, PassagesWriter
from transformerfam.tasks.passkey_training import PasskeySection, PasskeyWriter
from transformerfam.tasks.worded_keys_training import WordedKeysSection, WordedKeysWriter
from transformerfam.tasks.writing import TaskSection, Writer


@dataclass(frozen=True)
class Task:
    """What a task consists of.

    Attributes:
        section: its section `data` of a recipe.
        writer: writes what is trained on.
        asked_by: its comparison, `module:class`, looked up when systems are compared, since that room is above this
            one. None: no comparison has this name.
    """

    section: type[TaskSection]
    writer: type[Writer[Any]]
    asked_by: str | None = None

    @property
    def comparison(self) -> Any:
        """The class of its comparison, None where there is none."""
        return None if self.asked_by is None else pkgutil.resolve_name(self.asked_by)


TASKS = {
    "passkey": Task(PasskeySection, PasskeyWriter, "transformerfam.comparison.passkey:PasskeyComparison"),
    "named-keys": Task(NamedKeysSection, NamedKeysWriter, "transformerfam.comparison.named_keys:NamedKeysComparison"),
    "worded-keys": Task(WordedKeysSection, WordedKeysWriter),
    "passages": Task(PassagesSection, PassagesWriter),
    "facts": Task(FactsSection, FactsWriter, "transformerfam.comparison.facts:FactsComparison"),
}
"""By the key `task` of a recipe's section `data`, and of a comparison."""

ON_TEXTS = {
    "documents": "transformerfam.comparison.documents:DocumentsComparison",
    "answers": "transformerfam.comparison.answers:AnswersComparison",
}
"""Comparisons, `module:class`, of systems that are trained by a recipe's section `instructions`."""


def comparison_classes() -> dict[str, Any]:
    """Return the class of every comparison by its key `task`."""
    of_tasks = {name: task.comparison for name, task in TASKS.items() if task.asked_by is not None}
    return of_tasks | {name: pkgutil.resolve_name(place) for name, place in ON_TEXTS.items()}


def task_of_keys(keys: Collection[str]) -> str:
    """Return the task of a section `data` that does not say it.

    A task wins whose required key is given and belongs to no other task; else the first with the most of the keys.
    """

    def rank(name: str) -> tuple[bool, int]:
        fields = TASKS[name].section.model_fields
        needed = [key for key, field in fields.items() if field.is_required() and key in keys]
        is_alone = any(sum(key in task.section.model_fields for task in TASKS.values()) == 1 for key in needed)
        return is_alone, sum(key in fields for key in keys)

    return max(TASKS, key=rank)
