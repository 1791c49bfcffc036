"""The sections of a recipe.

The string under a field is what `fam train --print-recipe` and docs/reference/recipes.md say of it.

A field that no recipe of the repository sets needs a reason, or goes to `removed.REMOVED`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from transformerfam.tasks.ranges import (
    Count,
    Decay,
    Decays,
    Integer,
    Integers,
    Limits,
    LimitsFrom8,
    Natural,
    NotNegative,
    Number,
    Positive,
    Share,
    Texts,
)
from transformerfam.tasks.section import Section, require
from transformerfam.training.recipe.removed import with_keys_in_data

__all__ = [
    "KeyBiasSection",
    "LoraSection",
    "ModelSection",
    "OptimizerSection",
    "ReadingSection",
    "ScheduleSection",
    "Section",
    "Stage",
    "StatePassingSection",
]


class ModelSection(Section):
    """The model that is trained; the sizes are those of `tiny-random` and are ignored for others."""

    base: str
    """`tiny-random` (from scratch), `smollm2`, or a folder that `from_pretrained` reads."""
    memory: str | None = None
    """Name or folder of a trained memory of that base to start from: its prompt or prefix, and its weights or LoRA."""
    prompt_text: str | None = None
    """Text whose last `fam.fam_length` tokens the prompt begins as; None is the mean embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights, and so of products and activations, with LoRA. LoRA, prompt, FAM and the optimizer
    stay float32. bfloat16 is faster where the processor multiplies it (AVX-512 BF16, AMX, a GPU)."""
    num_hidden_layers: Count = 4
    """Layers of `tiny-random`."""
    hidden_size: Count = 128
    """Its width."""
    num_attention_heads: Count = 4
    """Its query heads, a divisor of `hidden_size`."""
    num_key_value_heads: Count = 4
    """Its key and value heads, a divisor of `num_attention_heads`."""
    intermediate_size: Count = 384
    """Width of its feed-forward layers."""
    vocabulary_from: str | None = None
    """Novel of the package, or UTF-8 file, whose 2,000 most frequent words `tiny-random` knows too; None: no other
    words than those of its task."""
    rope_theta: Positive = 10000.0
    """Base of RoPE's wavelengths."""
    seed: Natural = 0
    """Seed of the random weights."""

    @model_validator(mode="after")
    def _require_heads(self) -> Self:
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        require(
            self.base != "tiny-random" or width % heads == heads % groups == 0,
            f"model.hidden_size is {width}, with {heads} heads for {groups} of keys and values, required are numbers "
            "of which each divides the one before",
        )
        return self


class LoraSection(Section):
    """Low-rank adapters on the linear layers; without this section all weights are trained."""

    rank: Count = 16
    """Rank of the product that is added to a layer's."""
    alpha: Positive = 32.0
    """The product is scaled by `alpha / rank`."""
    targets: Texts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get adapters."""
    lr: NotNegative | None = None
    """Learning rate of the adapters; None is that of the optimizer section."""
    fused: bool = True
    """Add the low-rank product to the base layer's in place, which is faster; False is PEFT's own way."""

    @model_validator(mode="after")
    def _require_targets(self) -> Self:
        require(
            len(self.targets) > 0,
            "lora.targets is empty, required is at least one name of a linear layer; leave lora out to train all",
        )
        return self


class OptimizerSection(Section):
    """The optimizer and its learning rates."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """Which optimizer: Adafactor (3.1.1) keeps row and column sums instead of a second moment. That of transformers has
    no constant second beta: `betas[1]` is not used, its decay grows as 1 - step^-0.8."""
    lr: NotNegative = 1e-3
    """Learning rate after the warmup."""
    prompt_lr: NotNegative | None = None
    """Learning rate of the initial FAM (prompt or prefix); None is `lr`."""
    warmup_steps: Natural = 50
    """Steps over which the learning rate grows from near 0."""
    weight_decay: NotNegative = 0.01
    """At every step weights shrink by `lr * weight_decay` of themselves."""
    betas: Decays = (0.9, 0.95)
    """Decays of the averages of gradients and of their squares."""
    clip_norm: Positive = 1.0
    """Largest norm of all gradients together."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes from `decay_start` to the last step; cosine and linear end at 0.02 of `lr`."""
    decay_start: Natural = 0
    """Step at which cosine or linear decay begins."""
    average_decay: Decay = 0.0
    """Decay of an exponential moving average of the trained weights, which is what is kept at the end; 0 is none."""


class Stage(Section):
    """One stage of the curriculum."""

    filler_tokens: Limits
    """Least and most tokens of filler; every step draws one number from this range."""
    advance_accuracy: Share | None = None
    """Begin the next stage when the share of right keys over the last `window` steps is at least this; None waits for
    `max_steps`."""
    window: Count = 30
    """Steps whose keys `advance_accuracy` counts."""
    max_steps: Count | None = None
    """Begin the next stage after so many steps in any case."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of the section `data` in this stage: keys anywhere in a block are learned after keys at
    one place, and two names after one."""
    repeated_tokens: LimitsFrom8 | None = None
    """In this stage sequences are random tokens, so many at least and at most, the filler, and the same tokens again,
    to be predicted. It teaches to find what followed the same tokens before, without which neither names nor facts were
    learned in a thousand steps."""

    @model_validator(mode="before")
    @classmethod
    def _take_former_keys(cls, values: Any) -> Any:
        return with_keys_in_data(values) if isinstance(values, dict) else values


Stages = Annotated[tuple[Stage, ...], Strict(False)]


class ScheduleSection(Section):
    """How long, how much at a time, and in which order of lengths."""

    steps: Count
    """Last step."""
    curriculum: Stages = ()
    """The stages, one after the other: required for passkeys, not used with instructions."""
    batch_size: Count = 16
    """Sequences of a step."""
    accumulate: Integer = 1
    """Parts that a batch is read in, one after the other, their gradients added up: the same step in less memory."""
    max_seconds: NotNegative | None = None
    """Stop after so many seconds of training, all resumed runs together, even before the last step."""
    checkpoint_seconds: NotNegative = 120.0
    """Seconds from one checkpoint to the next."""
    seed: Natural = 0
    """Seed of the data and of all that a step draws."""
    threads: Count | None = None
    """Threads of torch; None leaves them."""
    checkpoint_blocks: bool = True
    """Keep no activations but one block's (activation checkpointing); False is faster and needs memory."""
    block_sizes: Integers = ()
    """Sizes of blocks: every step draws one of them, so that the memory can be read in any. The filler of a step is
    longer by as much as its block is larger than `fam.block_size`. Empty: always `fam.block_size`."""
    gradient_tokens: Count | None = None
    """Tokens at the end of every whole block that are read with gradient; those in front of them are read without it,
    which is faster, and predict nothing. The FAM keeps its gradient. None is every token."""
    repeat_updates: Limits = (0, 0)
    """Least and most further updates of the FAM after every block that precedes a step's question, by keys and values
    of filler already read in that step: many updates with their gradient, at one token each. With stored blocks it is
    by those, after the last such block. Needs `fam.num_memory_segments = 0`."""
    stored_blocks: Integer = 0
    """Blocks of filler whose keys and values are kept from step to step. All filler of a step is then taken from them,
    and only the key's sentences, the question and the `loss.num_other_tokens` in front of it are read, so that blocks
    of any size cost nearly the same. Needs `fam.num_memory_segments = 0`. 0 reads all filler in every step."""
    steps_per_stored_block: Integer = 2
    """Steps between stored blocks that are read again."""
    shard: bool = False
    """With several processes: shard the layers' weights, gradients and optimizer averages (FSDP2, by
    torch's `fully_shard`), where by default every process has all. Embeddings, norms and the initial FAM stay whole."""
    random_position_offset: bool = False
    """Random position offset, RPO (B.2.2): every second step on average moves all positions by one number up to the
    longest wavelength of RoPE. Only `fam.fam_position = "zero"` feels it; elsewhere positions are differences alone."""


class StatePassingSection(Section):
    """Random state passing, RSP (B.2.3): start a step from the FAM that the step before ended with."""

    probability: Share = 0.0
    """Share of the steps that start so; chains of steps have geometric length."""
    start_step: Natural | None = None
    """First step that may start from a saved FAM."""
    start_stage: Natural | None = None
    """First stage of the curriculum, counted from 0, that may."""
    rows: Literal["first", "all"] = "first"
    """Whose FAM is saved: the first sequence's for all (the paper), or each sequence's for itself."""
    ask_later: Share = 0.0
    """Share of sequences that continue with filler alone and query again the key that the step before got right; needs
    `rows = "all"`."""
    overwrite: Share = 1.0
    """Of the sequences that give a new key in a passed step, the share that starts from the saved FAM and has to
    overwrite the old key (1 is the paper); the others start from the initial FAM."""
    between_blocks: Limits = (0, 0)
    """Least and most blocks of filler, stored ones where there are any, that a passed FAM reads from one step to the
    next, without gradient: a cheap way to query even later."""
    between_steps: Natural = 0
    """Steps, from the first of the run, over which the most of `between_blocks` grows to what it is, so that a memory
    learns to write before it learns to hold for long. 0: from the beginning."""
    noise: NotNegative = 0.0
    """Standard deviation of the noise that is added to a passed FAM after every step, as a share of each row's root
    mean square: a memory that corrects errors is trained, not one in which they add up."""
    before_question: bool = False
    """Save the FAM as it was before the block of the question, so that answering refreshes nothing."""

    @model_validator(mode="after")
    def _require_own_keys(self) -> Self:
        require(
            self.ask_later == 0 or self.rows == "all",
            'state_passing.ask_later needs state_passing.rows = "all", since every sequence queries its own key',
        )
        return self


class KeyBiasSection(Section):
    """A bias on the FAM keys' logits that goes from `start_value` to exactly 0."""

    start_value: Number
    """Where it begins."""
    start_step: Natural = 0
    """Last step at which it is `start_value`."""
    end_step: Integer
    """First step at which it is 0."""


class ReadingSection(Section):
    """Fields of `fam` that the trained memory gets for reading, where they differ from those of training.

    Training without memory segments makes FAM carry all; a reader may still keep the block before in sight, and then
    sees the whole of a question that lies across the boundary of two blocks. A FAM that was bounded in
    training holds longer without a bound: `fam_norm_bound = inf`.
    """

    block_size: Integer | None = None
    """`fam.block_size` for reading."""
    num_memory_segments: Integer | None = None
    """`fam.num_memory_segments` for reading."""
    fam_norm_bound: float | None = None
    """`fam.fam_norm_bound` for reading; `inf` is no bound."""
