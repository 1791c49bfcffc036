"""All tasks by name."""

import pkgutil
from dataclasses import dataclass
from typing import Any

from transformerfam.tasks.facts_training import FactsSection, FactsWriter
from transformerfam.tasks.named_keys_training import NamedKeysSection, NamedKeysWriter
from transformerfam.tasks.passkey_training import PasskeySection, PasskeyWriter
from transformerfam.tasks.worded_keys_training import WordedKeysSection, WordedKeysWriter
from transformerfam.tasks.writing import TaskSection, Writer


@dataclass(frozen=True)
class Task:
    """What a task consists of.

    Attributes:
        section: its section `data` of a recipe.
        writer: writes what is trained on.
        asked_by: where the class of its comparison is, `module:name`; it stands above this room, and is looked up when
            systems are compared. None: nothing is asked by this name.
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
    "facts": Task(FactsSection, FactsWriter, "transformerfam.comparison.facts:FactsComparison"),
}
"""By the key `task` of a recipe's section `data`, and of a comparison."""
