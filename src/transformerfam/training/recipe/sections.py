"""The sections of a recipe."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSection:
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
    num_hidden_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 384
    vocabulary_from: str | None = None
    """Novel of the package, or UTF-8 file, whose most frequent words `tiny-random` knows too; None: no other words than
    those of its task."""
    vocabulary_words: int = 2000
    """How many of them."""
    rope_theta: float = 10000.0
    """Base of RoPE's wavelengths."""
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
    fused: bool = True
    """Add the low-rank product to the base layer's in place, which is faster; False is PEFT's own way."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer and its learning rates."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """Adafactor (3.1.1) keeps row and column sums instead of a second moment. transformers' has no constant second
    beta: `betas[1]` is not used, its decay grows as 1 - step^-0.8."""
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
    prefix_tokens: tuple[int, int] | None = None
    """In this stage, in place of `data.prefix_tokens`: keys that stand anywhere in a block are learned behind those
    that stand at one place."""
    named_keys: tuple[int, int] | None = None
    """In this stage, in place of `data.named_keys`."""
    key_digits: tuple[int, int] | None = None
    """In this stage, in place of `data.key_digits`, of named keys: with one digit they are soonest told apart."""
    facts: tuple[int, int] | None = None
    """In this stage, in place of `data.facts`."""
    fact_sentences: tuple[int, int] | None = None
    """In this stage, in place of `data.fact_sentences`."""
    repeated_tokens: tuple[int, int] | None = None
    """In this stage sequences are random tokens, so many at least and at most, the filler, and the same tokens again,
    to be predicted. It teaches to find what followed the same tokens before, without which neither names nor facts were
    learned in a thousand steps."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """How long, how much at a time, and in which order of lengths."""

    steps: int
    """Last step."""
    curriculum: tuple[Stage, ...] = ()
    """Required for passkeys, not used with instructions."""
    batch_size: int = 16
    accumulate: int = 1
    """Parts that a batch is read in, one after the other, their gradients added up: the same step in less memory."""
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
    block_sizes: tuple[int, ...] = ()
    """Sizes of blocks: every step draws one of them, so that the memory can be read in any. The filler of a step is
    longer by as much as its block is larger than `fam.block_size`. Empty: always `fam.block_size`."""
    gradient_tokens: int | None = None
    """Tokens at the end of every whole block that are read with gradient; those in front of them are read without it,
    which is faster, and predict nothing. The FAM keeps its gradient. None is every token."""
    repeat_updates: tuple[int, int] = (0, 0)
    """Least and most further updates of the FAM behind every block of a step that stands in front of the question, by
    keys and values of filler that the step has read already: many updates with their gradient, at one token each. With
    stored blocks it is by those, behind the last such block. Needs `fam.num_memory_segments = 0`."""
    stored_blocks: int = 0
    """Blocks of filler whose keys and values are kept from step to step. All filler of a step is then taken from them,
    and only the key's sentences, the question and the `loss.num_other_tokens` in front of it are read, so that blocks
    of any size cost nearly the same. Needs `fam.num_memory_segments = 0`. 0 reads all filler in every step."""
    steps_per_stored_block: int = 2
    """Steps from one stored block that is read anew to the next."""
    shard: bool = False
    """With several processes: share the layers' weights, gradients and optimizer averages out among them (FSDP2, by
    torch's `fully_shard`), where by default every process has all. Embeddings, norms and the initial FAM stay whole."""
    random_position_offset: bool = False
    """Random position offset, RPO (B.2.2): every second step on average moves all positions by one number up to the
    longest wavelength of RoPE. Only `fam.fam_position = "zero"` feels it; elsewhere positions are differences alone."""


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
    """Least and most blocks of filler, stored ones where there are any, that a passed FAM reads from one step to the
    next, without gradient: a cheap way to ask later still."""
    between_steps: int = 0
    """Steps, from the first of the run, over which the most of `between_blocks` grows to what it is, so that a memory
    learns to write before it learns to hold for long. 0: from the beginning."""
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
    key_digits: tuple[int, int] = (5, 5)
    """Least and most digits of a key; every step draws one number. The task's keys have five. Longer ones teach more
    per sequence, above all the place of each digit."""
    few_digits: float = 0.0
    """Share of the keys that are made of two or three different digits. Looking up which digit came behind the last one
    does not tell them, as it tells most keys of five different digits: only the place of a digit does."""
    short_intro: bool = False
    """Tell the key without the two sentences in front, so that a step of the same cost tells more keys: for the first
    part of a training."""
    boundary_share: float = 0.0
    """Share of the steps in which question and answer stand across the boundary of two blocks, where the filler's range
    allows it. There FAM alone can tell the second block that a question was asked."""
    prefix_tokens: tuple[int, int] = (0, 0)
    """Least and most tokens of filler in front of the sentences that tell the key; every step draws one number."""
    named_keys: tuple[int, int] = (0, 0)
    """Least and most keys that a sequence tells, each by a name; every step draws one number, and the question is for
    one of them. 0: the paper's one key without a name."""
    keys_asked: tuple[int, int] = (1, 1)
    """Least and most of the named keys that a sequence asks for, one after the other, each a key to predict; every step
    draws one number. A row counts as right when all of them are."""
    retold_keys: tuple[int, int] = (0, 0)
    """Least and most of the names that are told a second key, which counts."""
    keys_apart: tuple[int, int] = (0, 0)
    """Least and most tokens of filler between two keys that are told."""
    worded: bool = False
    """Tell the named keys, and ask for them, in the many wordings and names of `data/key_wordings.toml`, in text of
    `books` where there are any. `book` is then the share of sequences of text alone."""
    scenes: float = 0.0
    """Share of the worded keys that are told in a sentence of their own words, and not by a name."""
    passages: float = 0.0
    """Share of the worded keys that stand behind words of the text they are hidden in; the last ones ask for them."""
    mentions: tuple[int, int] = (1, 1)
    """Least and most times that each worded key is told; every key draws one number."""
    other_numbers: float = 0.0
    """Share of the sentences that tell a worded key in front of which stands one with another number."""
    facts: tuple[int, int] = (0, 0)
    """Least and most sentences from which the answer to a question on a hidden story follows, 1 to 3; every step draws
    one number. 0: no stories."""
    facts_asked: tuple[int, int] = (1, 1)
    """Least and most questions on a story, one after the other, each with an answer to predict; the last one has the
    drawn number of supports, those in front of it at most as many. A row counts as right when all answers are."""
    fact_sentences: tuple[int, int] = (4, 10)
    """Least and most sentences of a story."""
    allow_unknown: bool = False
    """Train on text of which the tokenizer knows next to no word, too."""
    fact_filler: str = "sentences"
    """What stories are hidden in: the passkey's sentences, a novel of the package, or a UTF-8 file."""


@dataclass(frozen=True, kw_only=True)
class InstructionSection:
    """Instructions and texts, packed to sequences of one length (3.1.1), in place of passkeys."""

    files: tuple[str, ...]
    """JSON lines, each with `messages` (the tokenizer's chat template), with `prompt` and `answer`, or with `text`."""
    length: int = 8500
    """Tokens of a packed sequence, the repeated segment included."""
    prompt_weight: float = 0.0
    """Weight of the tokens of prompts, few-shot examples and other roles."""
    answer_weight: float = 1.0
    """Weight of the tokens of answers and of plain texts."""
    repeat_tokens: int = 256
    """Consecutive tokens, drawn from the sequence, that it ends with once more; 0 repeats nothing."""
    repeat_weight: float = 0.1
    repeat_prompt: str = "[repeat random segment]:"
    """What announces the repeated segment; its weight is 0."""


@dataclass(frozen=True, kw_only=True)
class LossSection:
    """Weights of the tokens that are predicted; each kind is averaged by itself."""

    key: float = 1.0
    other_tokens: float = 0.1
    num_other_tokens: int = 32
    """Random other tokens of each sequence that are predicted too; on stored filler those in front of the question."""
    teacher: float = 0.0
    """Weight of the distance to a teacher, the base model with full attention: it reads the sentences that tell the key
    and the question in one piece, and over question and answer every layer's hidden states are to point where its own
    do. It says at every layer what is to be read from the FAM, where the key alone says it at the last."""
    teacher_filler_tokens: tuple[int, int] = (0, 64)
    """Least and most tokens of filler between the sentences and the question that the teacher reads."""
    full_attention: bool = False
    """Let the other tokens be predicted as the base model with full attention predicts them, which reads the same
    sequence: their loss is the divergence KL(base, own), in place of that of the next token. It says more per token,
    and leaves the model what it is."""
    diversity: float = 0.0
    """Weight of the paper's diversity loss (C.4): the negative entropy of the tokens' attention over the FAM's rows."""
    reconstruction: float = 0.0
    """Weight of the paper's reconstruction loss (C.5): a block's attention from its queries and the updated FAM."""
    fam_change: float = 0.0
    """Weight of the change of the FAM, relative to its length and before `fam.fam_norm_bound`, in the updates by blocks
    that tell no key: changes in one constant direction drown what was written, bound or not."""


@dataclass(frozen=True, kw_only=True)
class ReadingSection:
    """Fields of `fam` that the trained memory gets for reading, where they differ from those of training.

    Training without memory segments makes FAM carry all; a reader may still keep the block before in sight, and then
    sees the whole of a question that lies across the boundary of two blocks. A FAM that was bounded in
    training holds longer without a bound: `fam_norm_bound = inf`.
    """

    block_size: int | None = None
    num_memory_segments: int | None = None
    num_sink_tokens: int | None = None
    fam_norm_bound: float | None = None
