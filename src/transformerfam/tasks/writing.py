"""What the tasks' writers of training sequences share, and the keys that their sections of a recipe share.

All rows of a step have one length.
"""

import abc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from transformerfam.errors import RecipeError
from transformerfam.tasks.batch import Held, Row, Written
from transformerfam.tasks.filler import FillerStream
from transformerfam.tasks.question import Question
from transformerfam.tasks.ranges import Limits, LimitsFrom1, Share
from transformerfam.tasks.section import Section
from transformerfam.tasks.text import encode, read_text


class TaskSection(Section):
    """What a recipe trains on. Each task has a class with keys that no other task has.

    Attributes:
        can_be_taught: whether `loss.teacher` knows what to read.
        can_be_stored: whether its rows can be written on stored filler, `schedule.stored_blocks`.
        can_be_cut: whether `schedule.gradient_tokens` knows how long questions are with their answers.
        fixed_keys: keys that are the same in all stages of the curriculum.
        text_keys: keys that name a text: the passkey's sentences, a novel of the package, or a file.
        folder_keys: keys that name a folder of `.txt` files.
        file_keys: keys that name files, and folders for the `.txt` files in them and their folders.
    """

    can_be_taught: ClassVar[bool] = False
    can_be_stored: ClassVar[bool] = False
    can_be_cut: ClassVar[bool] = False
    fixed_keys: ClassVar[tuple[str, ...]] = ("task", "allow_unknown")
    text_keys: ClassVar[tuple[str, ...]] = ()
    folder_keys: ClassVar[tuple[str, ...]] = ()
    file_keys: ClassVar[tuple[str, ...]] = ()

    task: str
    """The task, which decides on the other keys of the section."""
    allow_unknown: bool = False
    """Train on text of which the tokenizer knows next to no word, too."""

    def words(self) -> tuple[str, ...]:
        """Return the words that a model which is trained from scratch has to know, besides those of passkeys."""
        return ()


class KeySection(TaskSection):
    """What all tasks with keys of digits share."""

    key_digits: LimitsFrom1 = (5, 5)
    """Least and most digits of a key; every step draws one number. The task's keys have five. Longer ones teach more
    per sequence, above all the place of each digit."""
    few_digits: Share = 0.0
    """Share of the keys that are made of two or three different digits. Looking up which digit followed the last one
    is not enough for them, as it is for most keys of five different digits: the place of a digit is needed."""
    prefix_tokens: Limits = (0, 0)
    """Least and most tokens of filler before the key; every step draws one number."""


AnySection = TypeVar("AnySection", bound=TaskSection)


class Writer(abc.ABC, Generic[AnySection]):
    """Write the rows of a task: pure functions of the seed, the step and the section.

    Attributes:
        filler: what rows are hidden in, most often.
        read: texts that the recipe names.
        wording_ids: tokens of the sentences that give and query keys.
    """

    filler: FillerStream
    read: Sequence[FillerStream] = ()
    wording_ids: Sequence[int] = ()

    def __init__(self, section: AnySection, tokenizer: Any, seed: int, ask_later: float) -> None:
        """Keep what rows are made of.

        Args:
            section: of the recipe.
            tokenizer: its tokenizer.
            seed: of all that is drawn.
            ask_later: share of rows that give no key and query what the passed state holds.

        Raises:
            RecipeError: a text that the section names cannot be used.
        """
        self.section, self.tokenizer, self.seed, self.ask_later = section, tokenizer, seed, ask_later

    @abc.abstractmethod
    def rows(
        self, draw: random.Random, step: int, num_filler: int, section: AnySection, carried: Sequence[Held | None]
    ) -> Written:
        """Write the rows of a step.

        Args:
            draw: the step's source of chance; a writer may have others.
            step: number of the step.
            num_filler: tokens of filler between key and question, in the longest row.
            section: of the recipe, as the stage of the curriculum changes it.
            carried: what the passed state of each row holds.
        """

    def draw_filler(
        self, draw: random.Random, step: int, limits: tuple[int, int], section: AnySection, block_size: int
    ) -> int:
        """Draw the number of filler tokens of a step.

        Args:
            draw: the step's source of chance.
            step: number of the step.
            limits: least and most.
            section: as for `rows`.
            block_size: of the step.
        """
        return draw.randint(*limits)

    def num_asked_tokens(self, section: AnySection) -> int:
        """Return the tokens of the longest question with its answer, 0 where they differ from row to row."""
        return 0

    def teacher_rows(self, rows: Sequence[Row], step: int, limits: tuple[int, int]) -> list[list[int]]:
        """Return what the teacher reads for each of the rows, all of one length, with question and answer at the end.

        It is filler, the sentences that give the answers, filler, and the questions.

        Args:
            rows: those with a question.
            step: number of the step.
            limits: least and most tokens of filler.
        """
        draw = random.Random(f"{self.seed}/{step}/teacher")
        num_filler = draw.randint(*limits)
        told = [[token for telling in row.tellings for token in telling] for row in rows]
        longest = num_filler + max(len(ids) + row.num_asked_tokens for ids, row in zip(told, rows, strict=True))
        found = []
        for ids, row in zip(told, rows, strict=True):
            start, num_between = draw.randrange(1 << 30), draw.randint(0, num_filler)
            num_before = longest - len(ids) - num_between - row.num_asked_tokens
            before = self.filler.slice(start, num_before).tolist()
            between = self.filler.slice(start + num_before, num_between).tolist()
            found.append(before + ids + between + row.ids[-row.num_asked_tokens :])
        return found

    def filler_rows(self, draw: random.Random, num_rows: int, num_tokens: int) -> torch.Tensor:
        """Return filler, `(num_rows, num_tokens)`, each row from its own place."""
        return torch.stack([self.filler.slice(draw.randrange(1 << 30), num_tokens) for _ in range(num_rows)])


class Asked:
    """Questions with their answers, one after the other.

    Args:
        questions: may be empty.
        end_ids: what separates an answer from the next question.
    """

    def __init__(self, questions: Sequence[Question], end_ids: list[int]) -> None:
        self.held: Held = tuple(questions)
        self.tellings = tuple(one.telling_ids for one in questions if one.telling_ids is not None)
        self.ids: list[int] = []
        self.answers: list[range] = []
        for question in questions:
            self.ids += [*(end_ids if self.ids else []), *question.ids]
            self.answers.append(range(len(self.ids), len(self.ids) + len(question.answer_ids)))
            self.ids += question.answer_ids

    def row(self, before: list[int], drawn: "Drawn", num_told_tokens: int) -> Row:
        """Return the row with these questions after a text."""
        if not self.answers:
            return Row(before, 0, None, is_told=False, held=None)
        places = [range(len(before) + answer.start, len(before) + answer.stop) for answer in self.answers]
        return Row(
            before + self.ids,
            len(places[-1]),
            drawn.key,
            drawn.is_told,
            self.held,
            num_told_tokens,
            earlier_answers=tuple(places[:-1]),
            num_asked_tokens=len(self.ids),
            tellings=self.tellings,
        )


@dataclass(frozen=True)
class Drawn:
    """One sequence before its filler is counted out."""

    fill: Callable[[int], tuple[list[int], int]]
    """Gives everything before the questions, with so many tokens of filler, and where the last fact ends."""
    num_told: int
    """Tokens before the questions without filler."""
    asked: Asked
    key: int | None
    is_told: bool = True


def with_filler(told: list[int], filler: FillerStream, start: int, num_filler: int) -> tuple[list[int], int]:
    """Return the facts, then so much filler, and where the facts end."""
    return told + filler.slice(start, num_filler).tolist(), len(told)


def asked_later(held: Held, filler: FillerStream, start: int, end_ids: list[int]) -> Drawn:
    """Return filler with the questions that the passed state has to answer."""
    assert not isinstance(held, int), "a passkey, which has its own rows"
    return Drawn(partial(with_filler, [], filler, start), 0, Asked(held, end_ids), None, is_told=False)


def even_rows(drawn: Sequence[Drawn], num_filler: int) -> Written:
    """Return rows of one length, of which the longest sequence has `num_filler`."""
    longest = max(one.num_told + len(one.asked.ids) for one in drawn)
    filled = [one.fill(num_filler + longest - one.num_told - len(one.asked.ids)) for one in drawn]
    rows = [one.asked.row(ids, one, num_told) for one, (ids, num_told) in zip(drawn, filled, strict=True)]
    return Written(rows, len(rows[0].ids) - max(len(one.asked.ids) for one in drawn))


def load_books(tokenizer: Any, folder: str | Path) -> FillerStream:
    """Tokenise all `.txt` files of a folder, in the order of their names.

    Raises:
        RecipeError: there is no such file.
        TransformerFamError: a file is not UTF-8.
    """
    paths = sorted(Path(folder).glob("*.txt"))
    if not paths:
        raise RecipeError(
            f"data.books is {str(folder)!r}, required is a folder with at least one .txt file; put books there"
        )
    tokens: list[int] = []
    read: Callable[[Path], str] = read_text
    texts = [read(path) for path in paths]
    if not any(text.strip() for text in texts):
        raise RecipeError(f"data.books is {str(folder)!r}, whose .txt files are empty; put text there")
    for text in texts:
        for paragraph in text.split("\n\n"):  # long texts at once make tokenizers slow and warn
            tokens += encode(tokenizer, paragraph + "\n\n")
    return FillerStream(tokens, Path(folder).name)
