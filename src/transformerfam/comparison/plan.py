"""What a comparison consists of: systems, seeds, the recipe that each run trains by, and what a task adds to it."""

import abc
import copy
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator
from rich.table import Table

from transformerfam.comparison.names import RunName, require_plain_name
from transformerfam.config import FamConfig
from transformerfam.errors import RecipeError
from transformerfam.reports.rows import Row
from transformerfam.rivals import PRESETS, RIVAL_NAMES
from transformerfam.rivals.presets import sections_of
from transformerfam.tasks.controls import control_of
from transformerfam.tasks.ranges import Integer, Integers, Texts
from transformerfam.tasks.section import Section
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.toml import build_recipe, set_value

UNTRAINED = "fam_untrained"
SYSTEMS = (*PRESETS, *RIVAL_NAMES, UNTRAINED)
BUDGET = ("steps", "batch_size", "accumulate", "max_seconds", "curriculum", "repeat_updates", "stored_blocks")
"""Keys of the section `schedule` that say how much a system is trained; so does all of the section `data`."""
BUDGET_KEY = rf"data\.|schedule\.({'|'.join(BUDGET)})(\.|$)"

Kind = Any
"""What parts the questions of a comparison; every task has its own."""

Asked = Mapping[Any, Mapping[str, Any]]
"""Questions of one kind, seed and length: by what a row calls them, further fields that its answer has to have."""

Update = Callable[[int, int, Any], None]
"""Called with how much is done, how much there is to do, and the state."""


class Asking(NamedTuple):
    """What a run is queried with.

    Attributes:
        run: which system, and which seed.
        model: what it has trained.
        tokenizer: its tokenizer.
        answered: rows that answer some of the questions.
        notes: of its training.
        update: is called again and again.
    """

    run: RunName
    model: Any
    tokenizer: Any
    answered: Sequence[Row]
    notes: Mapping[str, Any]
    update: Update


class Comparison(Section, abc.ABC):
    """All of a comparison: every system trained by one recipe, with every seed, asked at every length.

    Each task is a class with keys that no other task has.

    Source: sections 3.2 and 4 of arXiv 2404.09173.

    Attributes:
        lengths_key: name of the key that has the lengths.
        parted_by: names of the keys that part the questions, each number once.
        has_controls: whether controls of the memory, as `fam_memory_swapped`, are queried, too.
        also_trained_by: names of further tasks whose training teaches what is asked.
    """

    lengths_key: ClassVar[str]
    parted_by: ClassVar[tuple[str, ...]]
    has_controls: ClassVar[bool] = False
    also_trained_by: ClassVar[tuple[str, ...]] = ()

    task: str
    """What is asked; it selects the class."""

    name: str
    """What the rows call the model."""

    recipe: dict[str, Any]
    """Plain values of the recipe that all systems are trained by; its section `fam` is that of FAM."""

    systems: Texts
    """Of `PRESETS`, of the rivals, `fam_untrained`, and of `variants`; and of controls, as `fam_memory_swapped`."""

    seeds: Integers = (0,)
    """Each trains every system from other weights and on other data."""

    batch_size: Integer = 25
    """Texts that are read side by side."""

    changes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Of each system, what differs in its recipe: `section.key` and a value."""

    variants: dict[str, str] = Field(default_factory=dict)
    """Further names of systems, each for a system whose `changes` differ: the ablations."""

    allow_different_budgets: bool = False
    """Let `changes` change what a system is trained on, and how long."""

    @model_validator(mode="after")
    def _require_systems(self) -> Self:
        for name in (self.name, *self.systems, *self.variants):
            require_plain_name(name)
        for name in (*self.trained, *self.of_systems):
            self.system_of(name)
        for name in self.of_systems:
            if name not in self.systems:
                raise RecipeError(f"{name} is not among systems ({', '.join(self.systems)}); add it there")
        if not self.systems or not self.seeds or not self.lengths:
            raise RecipeError(f"systems, seeds or {self.lengths_key} is empty, at least one of each is required")
        for name in ("systems", "seeds", self.lengths_key, *self.parted_by):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise RecipeError(f"{name} is {list(values)}, required are different ones; name each once")
        for name in self.systems:
            control = control_of(name)
            if control is not None and (not self.has_controls or control[0] not in self.systems):
                raise RecipeError(
                    f"{name} is a control of the memory that {control[0]} trained; add {control[0]} to systems"
                )
        return self

    @model_validator(mode="after")
    def _require_one_budget(self) -> Self:
        if self.allow_different_budgets:
            return self
        for system, changes in self.changes.items():
            different = [key for key in _dotted(changes) if re.match(BUDGET_KEY, key)]
            if different:
                raise RecipeError(
                    f"changes.{system} gives {different[0]}, so that {system} would be trained with another budget "
                    "than the others; leave it out, or set allow_different_budgets = true"
                )
        return self

    @property
    def runs(self) -> list[RunName]:
        """All trainings; a control goes with the run of its system."""
        return [RunName(system, seed) for seed in self.seeds for system in self.trained]

    @property
    def trained(self) -> list[str]:
        """The systems that are trained, which controls are not."""
        return [system for system in self.systems if control_of(system) is None]

    def system_of(self, name: str) -> str:
        """Return the system that a name means: itself, or that of a variant.

        Raises:
            RecipeError: it is no system; the message has the nearest names.
        """
        system = self.variants.get(name, name)
        if system not in SYSTEMS:
            nearest = difflib.get_close_matches(system, (*SYSTEMS, *self.variants), n=3)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {', '.join(SYSTEMS)}"
            raise RecipeError(f"there is no system {system!r}; {hint}")
        return system

    @property
    @abc.abstractmethod
    def lengths(self) -> Sequence[int]:
        """Lengths at which every run is queried, in tokens."""

    @abc.abstractmethod
    def length_of(self, row: Row) -> int:
        """Return the length of a row's question."""

    @abc.abstractmethod
    def lengths_of(self, system: str) -> list[int]:
        """Return the lengths at which a system is queried."""

    @property
    def of_systems(self) -> list[str]:
        """The systems that other keys than `systems` name."""
        return list(self.changes)

    @property
    @abc.abstractmethod
    def kinds(self) -> Sequence[Kind]:
        """What parts the questions."""

    @abc.abstractmethod
    def kind_of(self, row: Row) -> Kind:
        """Return the kind of a row's question."""

    @abc.abstractmethod
    def question_of(self, row: Row) -> tuple[int | None, ...]:
        """Return what distinguishes questions of one kind and length; None where an earlier version did not note it."""

    @abc.abstractmethod
    def asked(self, kind: Kind, seed: int, length: int, block_size: int) -> Asked | None:
        """Return the questions of one kind, seed and length; None where they are not at hand, and rows are shown.

        Args:
            kind: of `kinds`.
            seed: of the questions.
            length: tokens of filler.
            block_size: of the system that is asked.

        Raises:
            TransformerFamError: a number is out of its range.
        """

    @abc.abstractmethod
    def require_askable(self) -> None:
        """Refuse numbers and texts that no question can have, before anything is trained.

        Raises:
            TransformerFamError: a number is out of its range, or a text cannot be read.
        """

    @abc.abstractmethod
    def questions_digest(self, length: int) -> str | None:
        """Return the field `questions` of its rows of one length; None where what is asked is not at hand."""

    @abc.abstractmethod
    def ask(self, asking: Asking) -> Iterable[Row]:
        """Query a run, and yield the rows of the questions that are not answered yet."""

    @abc.abstractmethod
    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Return what the rows say, as tables."""

    @abc.abstractmethod
    def plot(self, rows: Sequence[Row], path: str | Path) -> None:
        """Draw what the rows say.

        Args:
            rows: of this comparison, one at least.
            path: file to write; its suffix says how.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """

    @property
    def fields(self) -> Mapping[str, Any]:
        """What every answer has, where it has that field."""
        return {}

    @property
    @abc.abstractmethod
    def num_questions(self) -> int:
        """Questions that a run is asked at every length."""

    @abc.abstractmethod
    def require_tokens(self, tokenizer: Any) -> None:
        """Check that a tokenizer has tokens for what is asked, and knows enough of the texts.

        Raises:
            TransformerFamError: it has not, or does not.
        """

    def rows_of(self, run: RunName) -> list[str]:
        """Return the systems that a run's rows are of."""
        controls = [name for name in self.systems if (control_of(name) or ("",))[0] == run.system]
        return [run.system, *controls]

    def recipe_of(self, run: RunName) -> Recipe:
        """Return the recipe of a run.

        Random state passing is left out where there is no memory of fixed size to pass, and what only FAM has where
        the system is a rival.

        Args:
            run: the run.

        Raises:
            RecipeError: the recipe contradicts itself.
        """
        values = copy.deepcopy(self.recipe)
        fam = FamConfig.from_dict({"fam_key_bias": 0.0} | values.get("fam", {}))
        system = self.system_of(run.system)
        system = "fam" if system == UNTRAINED else system
        values |= sections_of(system, fam)
        values = {name: section for name, section in values.items() if section is not None}
        _with_seed(values, run.seed)
        for key, value in self.changes.get(run.system, {}).items():
            set_value(values, key, value)
        if build_recipe(values | {"state_passing": {}}).has_passable_memory:
            return build_recipe(values)
        return build_recipe(values | {"state_passing": {}})


def _dotted(values: Mapping[str, Any], front: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys, those in tables among them."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{front}{name}.")
        else:
            yield front + name


def _with_seed(values: dict[str, Any], seed: int) -> dict[str, Any]:
    for section in ("model", "schedule"):
        values[section] = values.get(section, {}) | {"seed": seed}
    return values
