"""Passkey questions: which keys are queried, after how much filler, and where each is in its text."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.reports.telling import NUM_DIGITS, Telling
from transformerfam.tasks.controls import SWAPPED
from transformerfam.tasks.filler import FillerStream, filler_text, load_shuffled, text_digest
from transformerfam.tasks.passkey import PAPER, PasskeyText, draw_keys
from transformerfam.tasks.provenance import questions_of
from transformerfam.tasks.unknown_words import require_filler, require_wording
from transformerfam.tasks.wordings import Wording

MAX_MENTIONS = 10_000

Question = tuple[str, int, int]
"""System, filler tokens and key: what distinguishes one question of a run from another."""


@dataclass(kw_only=True)
class PasskeyQuestions:
    """The questions of a passkey evaluation, and how they are put.

    Raises:
        TransformerFamError: a length is negative, there is none, or a number is out of its range.
    """

    filler_lengths: Sequence[int]
    """Tokens of filler, each at least 0."""

    num_keys: int
    """Different keys, each queried at every length."""

    seed: int = 0
    """Seed of keys, jitter and places in a book."""

    systems: Sequence[str] = ("fam",)
    """Names for the rows; those of controls change the memory before the question, on another fork."""

    filler: str | Path | FillerStream = "sentences"
    """"sentences" (the paper's), the name of a held-out novel, a UTF-8 text file, or a stream of tokens. A text that is
    too short repeats with its paragraphs in another order."""

    jitter: bool = True
    """Add up to a block of filler to each question, so that questions are at every place in a block."""

    prefix_tokens: int | Literal["uniform"] = 0
    """Tokens of filler before the key is last given; 0 in the paper. "uniform": keys are at any place
    of the text, spread evenly over it, and at least the window's tokens before the question; `filler_lengths` are then
    those of whole texts, of which each is read."""

    overwritten: bool = False
    """Give another key before those tokens of filler: the one that was given last must be recalled."""

    num_digits: int = NUM_DIGITS
    """Digits of a key."""

    num_mentions: int = 1
    """Times that a key is given, evenly over the prefix or, with "uniform", over the text."""

    wording: Wording = PAPER
    """How keys are given and queried."""

    checkpoint: str | Path | None = None
    """Beginning of the name of a file to which the reading is saved from time to time, so that a killed run resumes; it
    is deleted once the reading is done. None saves nothing."""

    checkpoint_seconds: float = 300.0
    """Seconds from one save to the next."""

    batch_size: int = 8
    """Keys that are read side by side."""

    model_name: str = "unnamed"
    """What the rows call the model."""

    max_training_filler_tokens: int | None = None
    """Longest filler that the model was trained on, for the rows."""

    finished: Collection[Question] = field(default_factory=frozenset)
    """Questions that were answered before; they are left out."""

    process: tuple[int, int] = (0, 1)
    """Number of this process and how many there are: each queries its share of the keys."""

    progress: Callable[[int, int, ReadingState], None] | None = None
    """Called after every block with the tokens of filler done, those to do (of all keys together), and the state."""

    def __post_init__(self) -> None:
        lengths = sorted(set(self.filler_lengths))
        if not lengths or lengths[0] < 0:
            raise TransformerFamError(
                f"filler_lengths is {list(self.filler_lengths)}, required are one or more lengths of at least 0 tokens"
            )
        if self.batch_size < 1:
            raise TransformerFamError(f"batch_size is {self.batch_size}, required is at least 1; change batch_size")
        if self.prefix_tokens != "uniform" and (isinstance(self.prefix_tokens, str) or self.prefix_tokens < 0):
            raise TransformerFamError(f"prefix_tokens is {self.prefix_tokens!r}, required is at least 0, or 'uniform'")
        if not 1 <= self.num_mentions <= MAX_MENTIONS:
            raise TransformerFamError(
                f"num_mentions is {self.num_mentions}, required is at least 1, since a key is given, and at most "
                f"{MAX_MENTIONS}"
            )
        if self.swaps and min(self.batch_size, self.num_keys) < 2:
            raise TransformerFamError(
                f"..{SWAPPED} gives each text the memory of another, and texts are read "
                f"{min(self.batch_size, self.num_keys)} at a time; required are at least 2 keys and a batch_size of 2"
            )
        if not self.systems:
            raise TransformerFamError("systems is empty, at least one name is required, for example fam")
        self.filler_lengths = lengths

    def text(self, tokenizer: Any) -> PasskeyText:
        """Return what writes the texts.

        Raises:
            TransformerFamError: the tokenizer knows too little of the filler or of the wording, or no digits.
        """
        filler = self.filler
        if not isinstance(filler, FillerStream):
            filler = load_shuffled(tokenizer, filler, self._filler_text)
        require_filler(tokenizer, filler)
        text = PasskeyText(tokenizer, filler, self.wording)
        require_wording(tokenizer, text.wording_ids, self.wording.name)
        return text

    @property
    def keys(self) -> list[int]:
        """The keys that are queried."""
        return draw_keys(self.num_keys, self.seed, self.num_digits)

    @cached_property
    def old_keys(self) -> list[int]:
        """Keys that are given before those that count, with `overwritten`, and differ from all of them."""
        return draw_keys(2 * self.num_keys, self.seed, self.num_digits)[self.num_keys :]

    @property
    def swaps(self) -> bool:
        """Whether a control swaps the memories of texts, which takes two at a time."""
        return any(name.endswith(SWAPPED) for name in self.systems)

    def jitters(self, num_filler_tokens: int, block_size: int) -> list[int]:
        """Return each key's additional filler at one length: spread evenly over a block, in random order."""
        if not self.jitter:
            return [0] * self.num_keys
        generator = torch.Generator().manual_seed(self._seed_of(num_filler_tokens))
        shift = torch.rand((), generator=generator).item()
        order = torch.randperm(self.num_keys, generator=generator).tolist()
        return [int((place + shift) * block_size / self.num_keys) % block_size for place in order]

    def _seed_of(self, num_filler_tokens: int) -> int:
        return (self.seed * 1_000_003 + num_filler_tokens) % 2**64  # which torch takes, whatever the seed

    def systems_missing(self, key: int, num_filler_tokens: int) -> list[str]:
        """Return the systems that have not answered a question."""
        return [name for name in self.systems if (name, num_filler_tokens, key) not in self.finished]

    def places(self, key_idx: int, num_filler_tokens: int, window: int) -> list[int]:
        """Return the tokens of filler before every mention of a key, in order.

        Args:
            key_idx: number of the key.
            num_filler_tokens: of the text, with "uniform".
            window: tokens before a question that it sees.
        """
        if self.prefix_tokens != "uniform":
            return [self.prefix_tokens * (i + 1) // self.num_mentions for i in range(self.num_mentions)]
        generator = torch.Generator().manual_seed(self._seed_of(num_filler_tokens))
        order = torch.randperm(self.num_keys, generator=generator).tolist()
        within = torch.rand(self.num_keys, generator=generator).tolist()
        share = (order[key_idx] + within[key_idx]) / self.num_keys  # each key in its own stratum
        free = num_filler_tokens - window
        return [int((i + share) * free / self.num_mentions) for i in range(self.num_mentions)]

    @cached_property
    def _filler_text(self) -> str:
        return filler_text(str(self.filler))

    @cached_property
    def questions(self) -> dict[str, str]:
        """The field `questions` of rows."""
        is_stream = isinstance(self.filler, FillerStream)
        digest = self.filler.digest if is_stream else text_digest(self._filler_text)  # type: ignore[union-attr]
        wording = self.wording
        return questions_of(digest, wording.intro, wording.question, wording.answer, self.jitter)

    @property
    def telling(self) -> Telling:
        """How the keys are given."""
        return Telling(
            0 if self.prefix_tokens == "uniform" else self.prefix_tokens,
            is_overwritten=self.overwritten,
            is_uniform=self.prefix_tokens == "uniform",
            num_digits=self.num_digits,
            num_mentions=self.num_mentions,
            wording=self.wording.name,
        )
