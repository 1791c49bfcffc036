"""The sections of a recipe that say what is read, and what is predicted."""

from typing import Self

from pydantic import model_validator

from transformerfam.training.recipe.ranges import (
    Integer,
    Limits,
    LimitsFrom1,
    Natural,
    NotNegative,
    Number,
    Share,
    Texts,
)
from transformerfam.training.recipe.section import Section, require


class DataSection(Section):
    """Shares of the kinds of sequence; they are drawn row by row and need not sum to one."""

    passkey_sentences: NotNegative = 1.0
    """Passkey in the paper's sentences."""
    passkey_book: NotNegative = 0.0
    """Passkey in book text."""
    book: NotNegative = 0.0
    """Book text alone."""
    books: str | None = None
    """Folder of UTF-8 `.txt` files; all are used."""
    key_digits: LimitsFrom1 = (5, 5)
    """Least and most digits of a key; every step draws one number. The task's keys have five. Longer ones teach more
    per sequence, above all the place of each digit."""
    few_digits: Share = 0.0
    """Share of the keys that are made of two or three different digits. Looking up which digit came behind the last one
    does not tell them, as it tells most keys of five different digits: only the place of a digit does."""
    short_intro: bool = False
    """Tell the key without the two sentences in front, so that a step of the same cost tells more keys: for the first
    part of a training."""
    boundary_share: Share = 0.0
    """Share of the steps in which question and answer stand across the boundary of two blocks, where the filler's range
    allows it. There FAM alone can tell the second block that a question was asked."""
    prefix_tokens: Limits = (0, 0)
    """Least and most tokens of filler in front of the sentences that tell the key; every step draws one number."""
    named_keys: Limits = (0, 0)
    """Least and most keys that a sequence tells, each by a name; every step draws one number, and the question is for
    one of them. 0: the paper's one key without a name."""
    keys_asked: LimitsFrom1 = (1, 1)
    """Least and most of the named keys that a sequence asks for, one after the other, each a key to predict; every step
    draws one number. A row counts as right when all of them are."""
    retold_keys: Limits = (0, 0)
    """Least and most of the names that are told a second key, which counts."""
    keys_apart: Limits = (0, 0)
    """Least and most tokens of filler between two keys that are told."""
    worded: bool = False
    """Tell the named keys, and ask for them, in the many wordings and names of `data/key_wordings.toml`, in text of
    `books` where there are any. `book` is then the share of sequences of text alone."""
    scenes: Number = 0.0
    """Share of the worded keys that are told in a sentence of their own words, and not by a name."""
    passages: Number = 0.0
    """Share of the worded keys that stand behind words of the text they are hidden in; the last ones ask for them."""
    mentions: LimitsFrom1 = (1, 1)
    """Least and most times that each worded key is told; every key draws one number."""
    other_numbers: Share = 0.0
    """Share of the sentences that tell a worded key in front of which stands one with another number."""
    facts: Limits = (0, 0)
    """Least and most sentences from which the answer to a question on a hidden story follows, 1 to 3; every step draws
    one number. 0: no stories."""
    facts_asked: LimitsFrom1 = (1, 1)
    """Least and most questions on a story, one after the other, each with an answer to predict; the last one has the
    drawn number of supports, those in front of it at most as many. A row counts as right when all answers are."""
    fact_sentences: Limits = (4, 10)
    """Least and most sentences of a story."""
    allow_unknown: bool = False
    """Train on text of which the tokenizer knows next to no word, too."""
    fact_filler: str = "sentences"
    """What stories are hidden in: the passkey's sentences, a novel of the package, or a UTF-8 file."""

    @model_validator(mode="after")
    def _require_sources(self) -> Self:
        require(
            self.books is not None or self.passkey_book == self.book == 0,
            "data.passkey_book or data.book is above 0, required is a folder of .txt files; set data.books",
        )
        require(
            self.named_keys[1] > 0 or self.retold_keys[1] == 0,
            "data.retold_keys is above 0 and data.named_keys is not",
        )
        require(
            self.named_keys[1] == 0 or self.facts[1] == 0,
            "data.named_keys and data.facts are both above 0, required is one of them",
        )
        return self

    @model_validator(mode="after")
    def _require_worded(self) -> Self:
        for name in ("mentions", "other_numbers", "scenes", "passages"):
            require(
                self.worded or getattr(self, name) == DataSection.model_fields[name].default,
                f"data.{name} is given and data.worded is false; set data.worded, or leave it out",
            )
        require(
            min(self.scenes, self.passages) >= 0 and self.scenes + self.passages <= 1,
            f"data.scenes is {self.scenes} and data.passages {self.passages}, required are shares of 0 or more with a "
            "sum of at most 1",
        )
        return self


class InstructionSection(Section):
    """Instructions and texts, packed to sequences of one length (3.1.1), in place of passkeys."""

    files: Texts
    """JSON lines, each with `messages` (the tokenizer's chat template), with `prompt` and `answer`, or with `text`."""
    length: Integer = 8500
    """Tokens of a packed sequence, the repeated segment included."""
    repeat_tokens: Natural = 256
    """Consecutive tokens, drawn from the sequence, that it ends with once more; 0 repeats nothing."""
    repeat_weight: NotNegative = 0.1
    """Weight of the repeated tokens; answers and plain texts weigh 1, prompts, examples and other roles 0."""

    @model_validator(mode="after")
    def _require_lengths(self) -> Self:
        require(len(self.files) > 0, "instructions.files is empty, required is at least one JSON lines file")
        require(
            self.length > 2 * self.repeat_tokens + 1,
            f"instructions.length is {self.length}, required is more than twice instructions.repeat_tokens "
            f"({self.repeat_tokens})",
        )
        return self


class LossSection(Section):
    """Weights of the tokens that are predicted; each kind is averaged by itself."""

    key: NotNegative = 1.0
    """Weight of the key's tokens, or of an answer's."""
    other_tokens: NotNegative = 0.1
    """Weight of the other tokens."""
    num_other_tokens: Natural = 32
    """Random other tokens of each sequence that are predicted too; on stored filler those in front of the question."""
    teacher: NotNegative = 0.0
    """Weight of the distance to a teacher, the base model with full attention: it reads the sentences that tell the key
    and the question in one piece, and over question and answer every layer's hidden states are to point where its own
    do. It says at every layer what is to be read from the FAM, where the key alone says it at the last."""
    teacher_filler_tokens: Limits = (0, 64)
    """Least and most tokens of filler between the sentences and the question that the teacher reads."""
    full_attention: bool = False
    """Let the other tokens be predicted as the base model with full attention predicts them, which reads the same
    sequence: their loss is the divergence KL(base, own), in place of that of the next token. It says more per token,
    and leaves the model what it is."""
    diversity: NotNegative = 0.0
    """Weight of the paper's diversity loss (C.4): the negative entropy of the tokens' attention over the FAM's rows."""
    reconstruction: NotNegative = 0.0
    """Weight of the paper's reconstruction loss (C.5): a block's attention from its queries and the updated FAM."""
    fam_change: NotNegative = 0.0
    """Weight of the change of the FAM, relative to its length and before `fam.fam_norm_bound`, in the updates by blocks
    that tell no key: changes in one constant direction drown what was written, bound or not."""
