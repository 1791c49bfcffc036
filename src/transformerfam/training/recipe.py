"""Recipes: one TOML file says all of a training run, and nothing that it does not know is let through."""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformerfam.config import FamConfig
from transformerfam.errors import RecipeError, TransformerFamError


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model that is trained; the sizes are those of `tiny-random` and are ignored for others."""

    base: str
    """`tiny-random` (from scratch), `smollm2`, or a folder that `from_pretrained` reads."""
    memory: str | None = None
    """Name or folder of a trained memory of that base to start from: its prompt or prefix, and its weights or LoRA."""
    num_hidden_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 384
    seed: int = 0
    """Seed of the random weights."""


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adapters on the linear layers; without this section all weights are trained."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lr: float | None = None
    """Learning rate of the adapters; None is that of the optimizer section."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW."""

    lr: float = 1e-3
    prompt_lr: float | None = None
    """Learning rate of the initial FAM (prompt or prefix); None is `lr`."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    """Largest norm of all gradients together."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes from `decay_start` to the last step; cosine and linear end at `final_lr_fraction`."""
    decay_start: int = 0
    """Step at which cosine or linear decay begins."""
    final_lr_fraction: float = 0.02
    average_decay: float = 0.0
    """Decay of an exponential moving average of the trained weights, which is what is kept at the end; 0 is none."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum."""

    filler_tokens: tuple[int, int]
    """Least and most tokens of filler; every step draws one number from this range."""
    advance_accuracy: float | None = None
    """Go on when the share of right keys over the last `window` steps is at least this; None waits for `max_steps`."""
    window: int = 30
    max_steps: int | None = None
    """Go on after so many steps in any case."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """How long, how much at a time, and in which order of lengths."""

    steps: int
    """Last step."""
    curriculum: tuple[Stage, ...]
    batch_size: int = 16
    max_seconds: float | None = None
    """Stop after so many seconds of training, all resumed runs together, even before the last step."""
    checkpoint_seconds: float = 120.0
    log_every: int = 1
    """Steps from one line of the log to the next."""
    seed: int = 0
    threads: int | None = None
    """Threads of torch; None leaves them."""
    checkpoint_blocks: bool = True
    """Keep no activations but one block's (activation checkpointing); False is faster and needs memory."""


@dataclass(frozen=True, kw_only=True)
class StatePassingSection:
    """Random state passing, RSP (B.2.3): start a step from the FAM that the step before ended with."""

    probability: float = 0.0
    start_step: int | None = None
    """First step that may start from a saved FAM."""
    start_stage: int | None = None
    """First stage of the curriculum, counted from 0, that may."""
    start_accuracy: float | None = None
    """Begin when the share of right keys over the window of the last stage is at least this."""
    rows: Literal["first", "all"] = "first"
    """Whose FAM is saved: the first sequence's for all (the paper), or each sequence's for itself."""
    ask_later: float = 0.0
    """Share of sequences that go on with filler alone and ask again for the key that the step before got right; needs
    `rows = "all"`."""
    overwrite: float = 1.0
    """Of the sequences that tell a new key in a passed step, the share that starts from the saved FAM and has to
    overwrite the old key (1 is the paper); the others start from the initial FAM."""
    between_blocks: tuple[int, int] = (0, 0)
    """Least and most blocks of filler that a passed FAM reads from one step to the next, without gradient: a cheap way
    to ask later still."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to a passed FAM after every step, as a share of each row's root
    mean square: a memory that corrects errors is trained, not one in which they add up."""
    before_question: bool = False
    """Save the FAM as it was before the block of the question, so that answering refreshes nothing."""


@dataclass(frozen=True, kw_only=True)
class KeyBiasSection:
    """A bias on the FAM keys' logits that goes from `start_value` to exactly 0."""

    start_value: float
    start_step: int = 0
    end_step: int


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Shares of the kinds of sequence; they are drawn row by row and need not sum to one."""

    passkey_sentences: float = 1.0
    """Passkey in the paper's sentences."""
    passkey_book: float = 0.0
    """Passkey in book text."""
    book: float = 0.0
    """Book text alone."""
    books: str | None = None
    """Folder of UTF-8 `.txt` files; all are used."""
    few_digits: float = 0.0
    """Share of the keys that are made of two or three different digits. Looking up which digit came behind the last one
    does not tell them, as it tells most keys of five different digits: only the place of a digit does."""
    boundary_share: float = 0.0
    """Share of the steps in which question and answer stand across the boundary of two blocks, where the filler's range
    allows it. There FAM alone can tell the second block that a question was asked."""
    prefix_tokens: tuple[int, int] = (0, 0)
    """Least and most tokens of filler in front of the sentences that tell the key; every step draws one number."""


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """Weights of the tokens that are predicted; each kind is averaged by itself."""

    key: float = 1.0
    other_tokens: float = 0.1
    num_other_tokens: int = 32
    """Random other tokens of each sequence that are predicted too."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of a training run.

    Raises:
        RecipeError: sections contradict each other.
    """

    model: ModelSection
    schedule: ScheduleSection
    fam: FamConfig = field(default_factory=lambda: FamConfig(fam_key_bias=0.0))
    lora: LoraSection | None = None
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    state_passing: StatePassingSection = field(default_factory=StatePassingSection)
    key_bias: KeyBiasSection | None = None
    data: DataSection = field(default_factory=DataSection)
    loss: LossSection = field(default_factory=LossSection)

    def __post_init__(self) -> None:
        _require(self.schedule.steps >= 1, f"schedule.steps is {self.schedule.steps}, required is at least 1")
        _require(self.schedule.batch_size >= 1, f"schedule.batch_size is {self.schedule.batch_size}, required is >= 1")
        _require(len(self.schedule.curriculum) > 0, "schedule.curriculum is empty, required is at least one stage")
        for stage in self.schedule.curriculum:
            _require_range("filler_tokens", *stage.filler_tokens)
        _require_range("data.prefix_tokens", *self.data.prefix_tokens)
        _require_range("state_passing.between_blocks", *self.state_passing.between_blocks)
        _require(
            self.state_passing.ask_later == 0 or self.state_passing.rows == "all",
            'state_passing.ask_later needs state_passing.rows = "all", since every sequence asks for its own key',
        )
        _require(
            self.state_passing.probability == 0 or self.fam.fam_length > 0,
            "state_passing.probability is above 0 but fam.fam_length is 0: there is no state to pass; "
            "set state_passing.probability = 0",
        )
        _require(
            self.data.books is not None or self.data.passkey_book == self.data.book == 0,
            "data.passkey_book or data.book is above 0, required is a folder of .txt files; set data.books",
        )
        _require(self.state_passing.noise >= 0, f"state_passing.noise is {self.state_passing.noise}, required is >= 0")
        if self.key_bias is not None:
            _require(
                self.key_bias.start_step < self.key_bias.end_step <= self.schedule.steps,
                f"key_bias goes from step {self.key_bias.start_step} to {self.key_bias.end_step}, required is an end "
                f"after the start and within the {self.schedule.steps} steps",
            )
        if self.fam.fam_key_bias != 0:
            raise RecipeError("fam.fam_key_bias must be 0 in a recipe; use the key_bias section, which ends at 0")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `build_recipe` takes back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a TOML file.
        overrides: each `section.key=value`; the value is TOML, or a plain word.

    Raises:
        RecipeError: the file cannot be read, is no TOML, or has an unknown, missing or wrong key.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {str(path)!r}: {error.strerror}; give the path of a TOML file"
        ) from error
    except ValueError as error:  # TOML syntax and UTF-8
        raise RecipeError(f"{path} is no valid TOML: {error}; correct the file") from error
    for override in overrides:
        apply_override(values, override)
    return build_recipe(values)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in the values of a recipe.

    Raises:
        RecipeError: there is no "=", or the key runs through something that is no section.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, name = dotted.strip().split(".")
    for section in sections:
        inner = values[int(section)] if isinstance(values, list) else values.setdefault(section, {})
        if not isinstance(inner, dict | list):
            raise RecipeError(f"override {override!r} goes into {section}, which is a value and no section")
        values = inner  # type: ignore[assignment]
    values[name] = value


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values.

    Raises:
        RecipeError: an unknown, missing or wrong key; the message names it, and the nearest known one.
    """
    return _build(Recipe, values, "")


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"{where or 'recipe'} is {values!r}, required is a section with keys")
    if cls is FamConfig:  # training begins with an open memory; the key_bias section may close it at first
        values = {"fam_key_bias": 0.0} | values
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {_join(where, nearest[0])}?" if nearest else f"known keys are {', '.join(fields)}"
            raise RecipeError(f"unknown key {_join(where, name)} in the recipe; {hint}")
    hints = typing.get_type_hints(cls)
    for name, known in fields.items():
        if name not in values and known.default is known.default_factory is dataclasses.MISSING:
            raise RecipeError(f"missing key {_join(where, name)} in the recipe; add it")
    built = {name: _convert(hints[name], value, _join(where, name)) for name, value in values.items()}
    try:
        return cls(**built)
    except RecipeError:
        raise
    except TransformerFamError as error:
        raise RecipeError(f"{where}: {error}") from error


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Check a plain value against an annotation and return it as that type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} is {value!r}, required is a list")
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise RecipeError(f"{where} is {value!r}, required is a list of {len(arguments)} values")
        return tuple(_convert(a, item, where) for a, item in zip(arguments, value, strict=True))
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where} is {value!r}, required is one of {', '.join(map(str, arguments))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"{where} is {value!r}, required is a value of type {kind.__name__}")
    return value


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RecipeError(message)


def _require_range(name: str, low: int, high: int) -> None:
    _require(0 <= low <= high, f"{name} is [{low}, {high}], required is 0 <= low <= high")
