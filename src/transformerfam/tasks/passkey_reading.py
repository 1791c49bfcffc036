"""Passkeys read: texts side by side in one state, which is forked and queried at every length."""

import hashlib
import json
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.decoder.memory import memory_of
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import ReadInterrupted, TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.processes import uninterrupted
from transformerfam.tasks.controls import control_of
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tasks.passkey_questions import PasskeyQuestions
from transformerfam.tasks.placed_text import PlacedText
from transformerfam.tasks.provenance import provenance, weights_of
from transformerfam.tasks.ragged import greedy_tokens, read_ragged, side_by_side


def window_of(model: Any) -> int:
    """Return the tokens that a question may see: its block, and of FAM the memory segments."""
    config = memory_of(model).config
    segments = config.num_memory_segments if isinstance(config, FamConfig) else 0
    return int(config.block_size * (segments + 1))


@dataclass
class PasskeyReading:
    """Keys whose texts are read side by side, as the rows of one state, and queried at some lengths.

    Jitter is read on the fork, just before the question.
    """

    options: PasskeyQuestions
    model: Any
    text: PasskeyText
    keys: list[int]
    key_indices: list[int]
    lengths: Sequence[int]
    share: tuple[int, int]
    """Tokens of filler of all keys that were read before this reading, and in all: for progress."""
    _saved_at: float = field(default=0.0, init=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read, evaluate, and yield the rows of the questions that have no answer yet."""
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
        """Read every text up to its end, and save the reading from time to time, and where it is interrupted."""
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
        """The text of every key: filler, and the sentences that give the key, and before it another one if need be."""
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
        """The tokens of filler before every mention of every key."""
        window = window_of(self.model)
        return [self.options.places(index, self.lengths[-1], window) for index in self.key_indices]

    def _ends(self, length: int) -> list[int]:
        """Return every text's tokens of filler, those before the key included."""
        if self.options.prefix_tokens == "uniform":
            return [length] * len(self.keys)
        return [self.options.prefix_tokens + length] * len(self.keys)

    def _num_tokens(self, length: int) -> list[int]:
        """Return the tokens of every text before the question."""
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
        """Return what reports a reading that continues after so many tokens, and saves it when it is due."""
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
        return [self.options.systems_missing(key, length) for key in self.keys]

    def _filler_starts(self) -> Tensor:
        """Return (B,) where each text's filler begins: the paper's at its first word, a book at a place per key.

        Prefix tokens come before that place.
        """
        before = 0 if self.options.prefix_tokens == "uniform" else self.options.prefix_tokens
        if self.text.filler.name == "sentences":
            return torch.full((len(self.keys),), -before)
        generator = torch.Generator().manual_seed(self.options.seed)
        starts = torch.randint(len(self.text.filler), (self.options.num_keys,), generator=generator)
        return starts[self.key_indices] - before

    @cached_property
    def _old_keys(self) -> list[int]:
        """Keys that are given before those that count."""
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
        """Query, and return each row's answer and whether it is the whole key."""
        wanted = [self.text.key_ids(key) for key in self.keys]
        question_BT = torch.tensor(self.text.question_ids).expand(len(self.keys), -1)
        said_BT = greedy_tokens(self.model, question_BT, state, max(len(ids) for ids in wanted))
        said = [ids[: len(key_ids)] for ids, key_ids in zip(said_BT.tolist(), wanted, strict=True)]
        return [(self.text.decode(ids), ids == key_ids) for ids, key_ids in zip(said, wanted, strict=True)]
