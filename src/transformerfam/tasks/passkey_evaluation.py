"""Passkey retrieval measured: one reading per key, forked and asked at every length."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.reading_state import ReadingState
from transformerfam.tasks.passkey import FillerStream, PasskeyText, draw_keys
from transformerfam.tasks.provenance import provenance

READ_TOKENS = 4096
"""Tokens of filler per row that are handed to the model at once: what keeps memory constant at any length."""

MEMORY_ZEROED = "fam_memory_zeroed"

Question = tuple[str, int, int]
"""System, filler tokens and key: what tells one question of a run from another."""


@dataclass(kw_only=True)
class PasskeyEvaluation:
    """Ask for passkeys at many filler lengths.

    Raises:
        TransformerFamError: a length is negative, there is none, or a number is out of its range.
    """

    filler_lengths: Sequence[int]
    """Tokens of filler, each at least 0."""

    num_keys: int
    """Different keys, each asked at every length."""

    seed: int = 0
    """Seed of keys, jitter and places in a book."""

    systems: Sequence[str] = ("fam",)
    """Names for the rows; "fam_memory_zeroed" zeroes the memory before the question, on a fork of its own."""

    filler: str | Path | FillerStream = "sentences"
    """"sentences" (the paper's), the name of a held-out novel, a UTF-8 text file, or a stream of tokens."""

    jitter: bool = True
    """Add up to a block of filler to each question, so that questions stand at every place in a block."""

    prefix_tokens: int = 0
    """Tokens of filler in front of the intro; the paper has none. It moves the key within its block."""

    overwritten: bool = False
    """Tell another key in front of those tokens of filler: the one that was told last must come back."""

    batch_size: int = 8
    """Keys that are read side by side."""

    model_name: str = "unnamed"
    """What the rows call the model."""

    max_training_filler_tokens: int | None = None
    """Longest filler that the model was trained on, for the rows."""

    finished: Collection[Question] = field(default_factory=frozenset)
    """Questions that were answered before; they are left out."""

    process: tuple[int, int] = (0, 1)
    """Number of this process and how many there are: each asks for its share of the keys."""

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
        if self.prefix_tokens < 0:
            raise TransformerFamError(f"prefix_tokens is {self.prefix_tokens}, required is at least 0")
        if not self.systems:
            raise TransformerFamError("systems is empty, at least one name is required, for example fam")
        self.filler_lengths = lengths

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, ask, and yield one row per question as soon as it is answered.

        Args:
            model: a converted model.
            tokenizer: its tokenizer.
        """
        text = PasskeyText(tokenizer, self.filler)
        keys = draw_keys(self.num_keys, self.seed)
        own = keys[self.process[0] :: self.process[1]]
        missing = [key for key in own if any(self._systems_missing(key, n) for n in self.filler_lengths)]
        block_size = model.fam_config.block_size
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        for batch_idx, batch in enumerate(batches):
            key_indices = [keys.index(key) for key in batch]
            share = (batch_idx * self.batch_size, len(missing))
            yield from _Batch(self, model, text, batch, key_indices, block_size, share).rows()

    def jitters(self, num_filler_tokens: int, block_size: int) -> list[int]:
        """Return each key's additional filler at one length: spread evenly over a block, in random order."""
        if not self.jitter:
            return [0] * self.num_keys
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + num_filler_tokens)
        shift = torch.rand((), generator=generator).item()
        order = torch.randperm(self.num_keys, generator=generator).tolist()
        return [int((place + shift) * block_size / self.num_keys) % block_size for place in order]

    def _systems_missing(self, key: int, num_filler_tokens: int) -> list[str]:
        return [name for name in self.systems if (name, num_filler_tokens, key) not in self.finished]


def finished_questions(rows: Iterable[Mapping[str, Any]], options: PasskeyEvaluation) -> frozenset[Question]:
    """Return the questions that `rows` answered with the same model, seed, filler and beginning as `options`."""
    name = options.filler.name if isinstance(options.filler, FillerStream) else Path(options.filler).name
    wanted = (options.model_name, options.seed, name, options.prefix_tokens, options.overwritten)
    return frozenset(
        (row["system"], row["filler_tokens"], row["key"])
        for row in rows
        if row["task"] == "passkey" and (row["model"], row["seed"], row.get("filler"), *telling_of(row)) == wanted
    )


def telling_of(row: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how a row's key was told: tokens of filler in front of it, and whether another key stood before those."""
    return row.get("prefix_tokens", 0), "old_key" in row


def evaluate_passkey(model: Any, tokenizer: Any, **options: Any) -> Iterator[dict[str, Any]]:
    """Yield one row per passkey question; the options are the fields of `PasskeyEvaluation`.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        options: see `PasskeyEvaluation`; `filler_lengths` and `num_keys` are required.

    Raises:
        TransformerFamError: an option is out of its range, or the filler is not UTF-8.

    Source: sections 3.2 and D.1.
    """
    return PasskeyEvaluation(**options).rows(model, tokenizer)


@dataclass
class _Batch:
    """Keys that are read as the rows of one state.

    The reading itself stays in step: every row reads the same number of filler tokens. Jitter is read on the fork,
    just before the question.
    """

    options: PasskeyEvaluation
    model: Any
    text: PasskeyText
    keys: list[int]
    key_indices: list[int]
    block_size: int
    share: tuple[int, int]
    """Keys that were done before this batch, and keys in all: for progress."""

    def rows(self) -> Iterator[dict[str, Any]]:
        lengths = [n for n in self.options.filler_lengths if any(self._missing(n))]
        starts_B = self._filler_starts()
        state = self._read_intros(starts_B - self.options.prefix_tokens)
        num_read = 0
        for length in lengths:
            while num_read < length:
                num_tokens = min(READ_TOKENS, length - num_read)
                filler_BT = self.text.filler.rows(starts_B + num_read, num_tokens)
                state = self.model.read(filler_BT, state, progress=self._progress(num_read, lengths[-1]))
                num_read += num_tokens
            yield from self._ask(state, length, starts_B + num_read)

    def _progress(self, num_read: int, length: int) -> Callable[[int, int, ReadingState], None] | bool:
        report, (num_before, num_keys) = self.options.progress, self.share
        if report is None:
            return False

        def update(done: int, total: int, state: ReadingState) -> None:
            report(num_before * length + len(self.keys) * (num_read + done), num_keys * length, state)

        return update

    def _missing(self, length: int) -> list[list[str]]:
        return [self.options._systems_missing(key, length) for key in self.keys]

    def _filler_starts(self) -> Tensor:
        """Return (B,) where each key's filler begins: the paper's text at its first word, a book at a place per key."""
        if self.text.filler.name == "sentences":
            return torch.zeros(len(self.keys), dtype=torch.long)
        generator = torch.Generator().manual_seed(self.options.seed)
        starts = torch.randint(len(self.text.filler), (self.options.num_keys,), generator=generator)
        return starts[self.key_indices]

    def _read_intros(self, prefix_starts_B: Tensor) -> ReadingState:
        prefix_BT = self.text.filler.rows(prefix_starts_B, self.options.prefix_tokens)
        rows = [prefix + self.text.intro_ids(key) for prefix, key in zip(prefix_BT.tolist(), self.keys, strict=True)]
        if self.options.overwritten:
            rows = [self.text.intro_ids(key) + ids for key, ids in zip(self._old_keys, rows, strict=True)]
        return read_ragged(self.model, [torch.tensor(ids) for ids in rows])

    @cached_property
    def _old_keys(self) -> list[int]:
        """Keys that are told before those that count, and differ from all of them."""
        num_keys = self.options.num_keys
        old_keys = draw_keys(2 * num_keys, self.options.seed)[num_keys:]
        return [old_keys[i] for i in self.key_indices]

    def _ask(self, state: ReadingState, length: int, filler_starts_B: Tensor) -> Iterator[dict[str, Any]]:
        missing = self._missing(length)
        jitters = [self.options.jitters(length, self.block_size)[i] for i in self.key_indices]
        ready = state.fork()
        tails = [self.text.filler.slice(int(start), j) for start, j in zip(filler_starts_B, jitters, strict=True)]
        ready = read_ragged(self.model, tails, ready)
        for system in self.options.systems:
            if not any(system in names for names in missing):
                continue
            fork = ready.fork()
            num_blocks = [num_tokens // self.block_size for num_tokens in fork.row_lengths]
            if system == MEMORY_ZEROED:
                fork.zero_memory()
            answers = self._answers(fork)
            for row_idx, (answer, is_correct) in enumerate(answers):
                if system in missing[row_idx]:
                    measured = {"jitter": jitters[row_idx], "num_blocks": num_blocks[row_idx]}
                    yield self._row(row_idx, system, length, measured | {"answer": answer, "correct": is_correct})

    def _row(self, row_idx: int, system: str, length: int, measured: dict[str, Any]) -> dict[str, Any]:
        """Return the row of one question."""
        if self.options.overwritten:
            old_key = self._old_keys[row_idx]
            is_outdated = measured["answer"] == self.text.decode(self.text.key_ids(old_key))
            measured = measured | {"old_key": old_key, "is_outdated": is_outdated}
        return {
            "task": "passkey",
            "system": system,
            "model": self.options.model_name,
            "seed": self.options.seed,
            "filler": self.text.filler.name,
            "filler_tokens": length,
            "prefix_tokens": self.options.prefix_tokens,
            "key": self.keys[row_idx],
            **measured,
            "max_training_filler_tokens": self.options.max_training_filler_tokens,
            **provenance(),
        }

    @torch.no_grad()
    def _answers(self, state: ReadingState) -> list[tuple[str, bool]]:
        """Ask, and return each row's answer and whether it is the whole key."""
        wanted = [self.text.key_ids(key) for key in self.keys]
        question_BT = torch.tensor(self.text.question_ids).expand(len(self.keys), -1)
        said_BT = greedy_tokens(self.model, question_BT, state, max(len(ids) for ids in wanted))
        said = [ids[: len(key_ids)] for ids, key_ids in zip(said_BT.tolist(), wanted, strict=True)]
        return [(self.text.decode(ids), ids == key_ids) for ids, key_ids in zip(said, wanted, strict=True)]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows of different lengths as `(B, T)`, padded on the left, and the mask of their tokens."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for row_idx, row in enumerate(rows):
        ids_BT[row_idx, longest - len(row) :] = row
        mask_BT[row_idx, longest - len(row) :] = 1
    return ids_BT, mask_BT


def read_ragged(model: Any, rows: Sequence[Tensor], state: ReadingState | None = None) -> ReadingState:
    """Read rows of different lengths into a state."""
    ids_BT, mask_BT = padded(rows)
    if ids_BT.shape[1] == 0 and state is not None:
        return state
    mask = None if bool(mask_BT.all()) else mask_BT
    read: ReadingState = model.read(ids_BT, state, attention_mask=mask, progress=False)
    return read


@torch.no_grad()
def greedy_tokens(
    model: Any, ids_BT: Tensor, state: ReadingState, num_tokens: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Feed `ids_BT` and return the `num_tokens` likeliest next tokens, one after the other, (B, num_tokens).

    The state advances over the input and all tokens but the last. `attention_mask` is of an input padded on the left.
    """
    said = []
    for _ in range(num_tokens):
        device = next(model.parameters()).device
        mask = None if attention_mask is None else attention_mask.to(device)
        output = model(input_ids=ids_BT.to(device), attention_mask=mask, past_key_values=state, logits_to_keep=1)
        ids_BT, attention_mask = output.logits[:, -1:].argmax(dim=-1), None
        said.append(ids_BT.cpu())
    return torch.cat(said, dim=1)
