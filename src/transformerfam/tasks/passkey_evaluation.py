"""Passkey retrieval measured: one reading per key, forked and asked at every length."""

import hashlib
import json
import random
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.decoder.memory import memory_of
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import ReadInterrupted, TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.processes import uninterrupted
from transformerfam.reports.telling import NUM_DIGITS, Telling
from transformerfam.tasks.controls import SWAPPED, control_of
from transformerfam.tasks.filler import FillerStream, filler_text, load_shuffled, text_digest
from transformerfam.tasks.passkey import PAPER, PasskeyText, draw_keys
from transformerfam.tasks.placed_text import PlacedText
from transformerfam.tasks.provenance import provenance, questions_of, weights_of
from transformerfam.tasks.ragged import greedy_tokens, read_ragged, side_by_side
from transformerfam.tasks.text import require_filler, require_wording
from transformerfam.tasks.wordings import Wording

MAX_MENTIONS = 10_000

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
    """Names for the rows; those of controls change the memory in front of the question, on another fork."""

    filler: str | Path | FillerStream = "sentences"
    """"sentences" (the paper's), the name of a held-out novel, a UTF-8 text file, or a stream of tokens. A text that is
    too short repeats with its paragraphs in another order."""

    jitter: bool = True
    """Add up to a block of filler to each question, so that questions stand at every place in a block."""

    prefix_tokens: int | Literal["uniform"] = 0
    """Tokens of filler before the key is last given; 0 in the paper. "uniform": keys are at any place
    of the text, spread evenly over it, and at least the window's tokens before the question; `filler_lengths` are then
    those of whole texts, of which each is read."""

    overwritten: bool = False
    """Tell another key in front of those tokens of filler: the one that was told last must come back."""

    num_digits: int = NUM_DIGITS
    """Digits of a key."""

    num_mentions: int = 1
    """Times that a key is told, evenly over the prefix or, with "uniform", over the text."""

    wording: Wording = PAPER
    """How keys are told and asked for."""

    checkpoint: str | Path | None = None
    """Beginning of the name of a file to which the reading is saved now and again, so that a killed run resumes; it is
    deleted once the reading is done. None saves nothing."""

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
        if self.prefix_tokens != "uniform" and (isinstance(self.prefix_tokens, str) or self.prefix_tokens < 0):
            raise TransformerFamError(f"prefix_tokens is {self.prefix_tokens!r}, required is at least 0, or 'uniform'")
        if not 1 <= self.num_mentions <= MAX_MENTIONS:
            raise TransformerFamError(
                f"num_mentions is {self.num_mentions}, required is at least 1, since a key is given, and at most "
                f"{MAX_MENTIONS}"
            )
        if self._swaps and min(self.batch_size, self.num_keys) < 2:
            raise TransformerFamError(
                f"..{SWAPPED} gives each text the memory of another, and texts are read "
                f"{min(self.batch_size, self.num_keys)} at a time; required are at least 2 keys and a batch_size of 2"
            )
        if not self.systems:
            raise TransformerFamError("systems is empty, at least one name is required, for example fam")
        self.filler_lengths = lengths

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, ask, and yield one row per question as soon as it is answered.

        Args:
            model: a converted model.
            tokenizer: its tokenizer.
        """
        text = self.text(tokenizer)
        keys = self.keys
        own = keys[self.process[0] :: self.process[1]]
        window = _window(model)
        if self.prefix_tokens == "uniform" and self.filler_lengths[0] <= window:
            raise TransformerFamError(
                f"a text of {self.filler_lengths[0]} tokens has no place for a key in front of the {window} tokens in "
                f"sight of the question; give --filler-tokens above {window}, or --prefix-tokens a number"
            )
        lengths = list(self.filler_lengths)
        readings = [[length] for length in lengths] if self.prefix_tokens == "uniform" else [lengths]
        missing = [key for key in own if any(self._systems_missing(key, n) for n in self.filler_lengths)]
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        if len(batches) > 1 and len(batches[-1]) == 1 and self._swaps:
            batches[-2:] = [batches[-2][:-1], batches[-2][-1:] + batches[-1]]  # nobody is read alone
        total = len(missing) * sum(group[-1] for group in readings)
        done = 0
        for batch in batches:
            for group in readings:
                reading = _Reading(self, model, text, batch, [keys.index(key) for key in batch], group, (done, total))
                yield from reading.rows()
                done += len(batch) * group[-1]

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
        """The keys that are asked for."""
        return draw_keys(self.num_keys, self.seed, self.num_digits)

    @cached_property
    def old_keys(self) -> list[int]:
        """Keys that are told before those that count, with `overwritten`, and differ from all of them."""
        return draw_keys(2 * self.num_keys, self.seed, self.num_digits)[self.num_keys :]

    @property
    def _swaps(self) -> bool:
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

    def _systems_missing(self, key: int, num_filler_tokens: int) -> list[str]:
        return [name for name in self.systems if (name, num_filler_tokens, key) not in self.finished]

    def places(self, key_idx: int, num_filler_tokens: int, window: int) -> list[int]:
        """Return the tokens of filler in front of every telling of a key, in order.

        Args:
            key_idx: number of the key.
            num_filler_tokens: of the text, with "uniform".
            window: tokens in front of a question that it sees.
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
        """How the keys are told."""
        return Telling(
            0 if self.prefix_tokens == "uniform" else self.prefix_tokens,
            is_overwritten=self.overwritten,
            is_uniform=self.prefix_tokens == "uniform",
            num_digits=self.num_digits,
            num_mentions=self.num_mentions,
            wording=self.wording.name,
        )


def _window(model: Any) -> int:
    """Return the tokens that a question may see: its block, and of FAM the memory segments."""
    config = memory_of(model).config
    segments = config.num_memory_segments if isinstance(config, FamConfig) else 0
    return int(config.block_size * (segments + 1))


def finished_questions(rows: Iterable[Mapping[str, Any]], options: PasskeyEvaluation) -> frozenset[Question]:
    """Return the questions that `rows` answered with the same model, seed, filler and telling as `options`.

    Raises:
        TransformerFamError: some of them were asked with another text of the filler's or the wording's name, or with
            jitter and without it.
    """
    name = options.filler.name if isinstance(options.filler, FillerStream) else Path(options.filler).name
    wanted = (options.model_name, options.seed, name, options.telling)
    found = set()
    for row in rows:
        if row["task"] != "passkey" or (row["model"], row["seed"], row.get("filler"), Telling.of_row(row)) != wanted:
            continue
        there, here = row.get("questions"), options.questions["questions"]
        if there not in (None, here) and row["system"] in options.systems:
            raise TransformerFamError(
                f"the rows of {row['system']} of {options.model_name} answer other questions ({there} there, {here} "
                f"here): the text of the filler {name}, the wording {options.telling.wording} or the jitter was "
                "changed; give the new answers a file of their own"
            )
        found.add((row["system"], row["filler_tokens"], row["key"]))
    return frozenset(found)


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
class _Reading:
    """Keys whose texts are read side by side, as the rows of one state, and asked at some lengths.

    Jitter is read on the fork, just before the question.
    """

    options: PasskeyEvaluation
    model: Any
    text: PasskeyText
    keys: list[int]
    key_indices: list[int]
    lengths: Sequence[int]
    share: tuple[int, int]
    """Tokens of filler of all keys that were read before this reading, and in all: for progress."""
    _saved_at: float = field(default=0.0, init=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        lengths = [n for n in self.lengths if any(self._missing(n))]
        if not lengths:
            return
        path = self._checkpoint_path
        state = self._saved_state(path, self._num_tokens(lengths[0]))
        if state is None:
            with torch.no_grad():
                state = self.model.init_state(len(self.keys))
        self._saved_at = time.monotonic()
        for length in lengths:
            self._read(state, self._num_tokens(length), path)
            yield from self._ask(state, length)
        if path is not None:
            path.unlink(missing_ok=True)

    def _read(self, state: ReadingState, ends_B: list[int], path: Path | None) -> None:
        """Read every text up to its end, and save the reading now and then, and where it is interrupted."""
        begins_B, slices = list(state.row_lengths), [text.slice for text in self.texts]
        if begins_B == ends_B:
            return
        pieces = side_by_side(slices, begins_B, ends_B, state.config.block_size)
        try:
            self.model.read(pieces, state, progress=self._progress(max(begins_B), path))
        except ReadInterrupted as interrupt:
            if path is not None:
                with uninterrupted():
                    interrupt.state.save(path)
            raise

    @cached_property
    def texts(self) -> list[PlacedText]:
        """The text of every key: filler, and the sentences that tell the key, and before it another one if need be."""
        found = []
        for row, (key, start) in enumerate(zip(self.keys, self._filler_starts().tolist(), strict=True)):
            places = self.places[row]
            sentences = [(place, self.text.intro_ids(key)) for place in places]
            if self.options.overwritten:
                draw = random.Random(f"{self.options.seed}/{self.lengths[-1]}/{self.key_indices[row]}/old")
                is_uniform = self.options.prefix_tokens == "uniform"
                at = draw.randint(0, places[0]) if is_uniform else 0
                sentences.insert(0, (at, self.text.intro_ids(self._old_keys[row])))
            found.append(PlacedText(self.text.filler, start, [(0, self.text.start_ids), *sentences]))
        return found

    @cached_property
    def places(self) -> list[list[int]]:
        """The tokens of filler in front of every telling of every key."""
        window = _window(self.model)
        return [self.options.places(index, self.lengths[-1], window) for index in self.key_indices]

    def _ends(self, length: int) -> list[int]:
        """Return every text's tokens of filler, those in front of the key included."""
        if self.options.prefix_tokens == "uniform":
            return [length] * len(self.keys)
        return [self.options.prefix_tokens + length] * len(self.keys)

    def _num_tokens(self, length: int) -> list[int]:
        """Return the tokens of every text in front of the question."""
        return [text.length(end) for text, end in zip(self.texts, self._ends(length), strict=True)]

    @property
    def _checkpoint_path(self) -> Path | None:
        """Where this reading is saved; its name says what is read."""
        if self.options.checkpoint is None or not isinstance(self.model.init_state(1), FamState):
            return None
        said = (self.keys, self.options.model_name, self.text.filler.name, str(self.options.telling), self.lengths[-1])
        more = (self.options.seed, self.options.questions)
        digest = hashlib.sha256(json.dumps([*said, *more]).encode()).hexdigest()[:16]
        path = Path(self.options.checkpoint)
        return path.with_name(f"{path.name}.{digest}.reading.safetensors")

    def _saved_state(self, path: Path | None, goals_B: list[int]) -> ReadingState | None:
        """Return the reading that a killed run has saved; None where there is none of these weights and this place.

        Warns:
            UserWarning: there is one that cannot be used, and why.
        """
        if path is None or not path.is_file():
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # other weights
            try:
                state = FamState.load(path, self.model, batch_size=len(self.keys))
            except (UserWarning, TransformerFamError) as error:
                reason = str(error)
            else:
                reason = ""
        if reason:
            warnings.warn(f"{reason}; it is dropped, and the text is read again from its beginning", stacklevel=2)
            path.unlink()
            return None
        is_short = all(done <= goal for done, goal in zip(state.row_lengths, goals_B, strict=True))
        return state if is_short else None

    def _progress(self, num_read: int, path: Path | None) -> Callable[[int, Any, ReadingState], None]:
        """Return what tells of a reading that goes on behind so many tokens, and saves it when it is time to."""
        report, (before, total) = self.options.progress, self.share

        def update(done: int, _: Any, state: ReadingState) -> None:
            if path is not None and time.monotonic() - self._saved_at > self.options.checkpoint_seconds:
                state.save(path)
                self._saved_at = time.monotonic()
            if report is not None:
                filler = min(num_read + done, self.lengths[-1])
                report(before + len(self.keys) * filler, total, state)

        return update

    def _missing(self, length: int) -> list[list[str]]:
        return [self.options._systems_missing(key, length) for key in self.keys]

    def _filler_starts(self) -> Tensor:
        """Return (B,) where each text's filler begins: the paper's at its first word, a book at a place per key.

        Prefix tokens come in front of that place.
        """
        before = 0 if self.options.prefix_tokens == "uniform" else self.options.prefix_tokens
        if self.text.filler.name == "sentences":
            return torch.full((len(self.keys),), -before)
        generator = torch.Generator().manual_seed(self.options.seed)
        starts = torch.randint(len(self.text.filler), (self.options.num_keys,), generator=generator)
        return starts[self.key_indices] - before

    @cached_property
    def _old_keys(self) -> list[int]:
        """Keys that are told before those that count."""
        return [self.options.old_keys[i] for i in self.key_indices]

    def _ask(self, state: ReadingState, length: int) -> Iterator[dict[str, Any]]:
        missing = self._missing(length)
        block_size = memory_of(self.model).config.block_size
        jitters = [self.options.jitters(length, block_size)[i] for i in self.key_indices]
        tails = [
            self.text.filler.slice(text.start + end, jitter)
            for text, end, jitter in zip(self.texts, self._ends(length), jitters, strict=True)
        ]
        ready = read_ragged(self.model, tails, state.fork())
        for system in self.options.systems:
            if not any(system in names for names in missing):
                continue
            fork = ready.fork()
            num_blocks = [num_tokens // block_size for num_tokens in fork.row_lengths]
            if (control := control_of(system)) is not None:
                fork = control[1](fork)
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
        telling = self.options.telling
        return {
            "task": "passkey",
            "system": system,
            "model": self.options.model_name,
            "seed": self.options.seed,
            "filler": self.text.filler.name,
            "filler_tokens": length,
            "prefix_tokens": self.places[row_idx][-1],
            "placing": "uniform" if telling.is_uniform else "fixed",
            "num_digits": telling.num_digits,
            "num_mentions": telling.num_mentions,
            "wording": telling.wording,
            "key": self.keys[row_idx],
            **measured,
            "max_training_filler_tokens": self.options.max_training_filler_tokens,
            **self.options.questions,
            **weights_of(self.model),
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
