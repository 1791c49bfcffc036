"""Rows of the tasks with more than one key, named keys and facts, and rows that repeat themselves.

All rows of a step have one length.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformerfam.tasks.facts import FactsText, Story, draw_story, words
from transformerfam.tasks.named_keys import NamedKeysText, draw_named_keys
from transformerfam.tasks.passkey import FillerStream
from transformerfam.tasks.question import Question
from transformerfam.tasks.text import encode
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.sections import Stage

Held = int | tuple[Question, ...]
"""What a memory holds and is asked for: a passkey, or questions on named keys and facts."""


@dataclass(frozen=True)
class Row:
    """One sequence before it is weighed: its tokens, and where an answer stands at its end."""

    ids: list[int]
    num_answer_tokens: int
    """Tokens at the end that must be predicted whole; 0 for plain text."""
    key: int | None
    """The key that it asks for, with several questions the last of them."""
    is_told: bool
    """Whether it tells that key; if not, it asks for the key of the passed state."""
    held: Held | None
    """What its memory holds when all its answers are right; None where it asks nothing."""
    num_told_tokens: int = 0
    """Tokens up to the end of the last thing that it tells."""
    earlier_answers: tuple[range, ...] = ()
    """Where the answers of further questions stand, in front of the last one."""
    num_asked_tokens: int = 0
    """Tokens at the end of all questions and answers together."""
    tellings: tuple[tuple[int, ...], ...] = ()
    """What a teacher reads in front of them: the sentences that tell each answer."""


class NamedRows:
    """Tell several keys, each by a name, and ask for some of them."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.data, self.schedule = recipe.data, recipe.schedule
        self.ask_later = recipe.state_passing.ask_later
        self.text = NamedKeysText(tokenizer)
        self.wording_ids = self.text.wording_ids

    def rows(self, step: int, num_filler: int, stage: Stage, carried: Sequence[Held | None]) -> tuple[list[Row], int]:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler behind the last key that is told, in the row with the longest sentences.
            stage: of the curriculum.
            carried: what the passed state of each row holds.

        Returns:
            The rows, and where the earliest question begins.
        """
        draw, text = random.Random(f"{self.schedule.seed}/{step}/named"), self.text
        num_told = draw.randint(*(stage.named_keys or self.data.named_keys))
        num_retold = min(num_told, draw.randint(*self.data.retold_keys))
        num_prefix = draw.randint(*(stage.prefix_tokens or self.data.prefix_tokens))
        num_asked = min(num_told, draw.randint(*self.data.keys_asked))
        num_digits = draw.randint(*(stage.key_digits or self.data.key_digits))
        later, drawn = random.Random(f"{self.schedule.seed}/{step}/later"), []
        for held in carried:
            keys = draw_named_keys(draw, num_told, num_retold, self.data.keys_apart, num_digits, self.data.few_digits)
            names = draw.sample(list(keys.newest), num_asked)
            start = draw.randrange(1 << 30)
            before = text.filler.slice(start, num_prefix).tolist() + text.intro_ids(keys, start + num_prefix)
            questions = [Question.of(text.question_ids(name), text.key_ids(keys.newest[name])) for name in names]
            if later.random() < self.ask_later and held is not None:
                drawn.append(asked_later(held, text.filler, start, text.end_ids))
                continue
            fill = partial(with_filler, before, text.filler, start + len(before))
            drawn.append(Drawn(fill, len(before), Asked(questions, text.end_ids), keys.newest[names[-1]]))
        return even_rows(drawn, num_filler)


class FactRows:
    """Hide a story in filler, and ask a question on it."""

    def __init__(self, recipe: Recipe, tokenizer: Any, filler: str) -> None:
        self.data, self.schedule = recipe.data, recipe.schedule
        self.ask_later = recipe.state_passing.ask_later
        self.text = FactsText(tokenizer, filler)

    def rows(self, step: int, num_filler: int, stage: Stage, carried: Sequence[Held | None]) -> tuple[list[Row], int]:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler in all, in the row with the longest story.
            stage: of the curriculum.
            carried: what the passed state of each row holds.

        Returns:
            The rows, and where the earliest question begins.
        """
        draw = random.Random(f"{self.schedule.seed}/{step}/facts")
        num_supports = draw.randint(*(stage.facts or self.data.facts))
        num_sentences = draw.randint(*(stage.fact_sentences or self.data.fact_sentences))
        num_asked, end_ids = draw.randint(*self.data.facts_asked), self.text.encode(".")
        later, drawn = random.Random(f"{self.schedule.seed}/{step}/later"), []
        for held in carried:
            story = draw_story(draw, num_supports, num_sentences)
            chosen = draw.sample(story.further, min(num_asked - 1, len(story.further)))
            pairs = [*chosen, (story.question, story.answer)]
            asked = Asked([Question.of(self.text.encode(q), self.text.encode(a)) for q, a in pairs], end_ids)
            num_told = sum(len(self.text.encode(sentence)) for sentence in story.sentences)
            if later.random() < self.ask_later and held is not None:
                drawn.append(asked_later(held, self.text.filler, draw.randrange(1 << 30), end_ids))
                continue
            drawn.append(Drawn(partial(self._hidden, story, draw), num_told, asked, None))
        return even_rows(drawn, num_filler)

    def _hidden(self, story: Story, draw: random.Random, num_filler: int) -> tuple[list[int], int]:
        hidden = self.text.hide(story, num_filler, draw)
        return hidden.ids_T.tolist(), hidden.num_told_tokens


class RepeatedRows:
    """Say random tokens, and say them again.

    To foretell the second time, a model has to find what followed the same tokens before (an induction head). Keys
    that are told apart by names, and facts, need just that, and hardly ever teach it by themselves.
    """

    NUM_WORDS = (6, 40)
    """Least and most different tokens of a row: the fewer, the more of them must agree to find the place."""
    NUM_FREE = 4
    """First tokens of the second time that are not predicted, since too little stands in front of them."""

    def __init__(self, recipe: Recipe, tokenizer: Any, filler: FillerStream) -> None:
        self.schedule, self.tokenizer, self.filler = recipe.schedule, tokenizer, filler
        self.asks_facts = recipe.data.facts[1] > 0

    @cached_property
    def vocabulary(self) -> list[int]:
        """All tokens but the special ones; where the task is facts, whose model knows thousands, those of stories."""
        if self.asks_facts:
            return sorted({token for word in words() for token in encode(self.tokenizer, f" {word}")})
        return sorted(set(range(len(self.tokenizer))) - set(self.tokenizer.all_special_ids))

    def rows(self, step: int, num_filler: int, stage: Stage, carried: Sequence[Held | None]) -> tuple[list[Row], int]:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler between the first time and the second.
            stage: of the curriculum, with `repeated_tokens`.
            carried: what the passed state of each row holds, which nothing asks for.

        Returns:
            The rows, and where the second time begins.
        """
        assert stage.repeated_tokens is not None
        draw = random.Random(f"{self.schedule.seed}/{step}/repeated")
        length = draw.randint(*stage.repeated_tokens)
        rows = []
        for _ in carried:
            chosen = draw.sample(self.vocabulary, min(draw.randint(*self.NUM_WORDS), len(self.vocabulary)))
            ids = draw.choices(chosen, k=length)
            filler = self.filler.slice(draw.randrange(1 << 30), num_filler).tolist()
            rows.append(Row(ids + filler + ids, length - self.NUM_FREE, None, is_told=True, held=None))
        return rows, length + num_filler


class Asked:
    """Questions with their answers, one after the other.

    Args:
        questions: what is asked; none asks nothing.
        end_ids: what stands between an answer and the next question.
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
        """Return the row that asks them behind a text."""
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
    """Gives everything in front of the questions, with so many tokens of filler, and where the last thing told ends."""
    num_told: int
    """Tokens in front of the questions without filler."""
    asked: Asked
    key: int | None
    is_told: bool = True


def with_filler(told: list[int], filler: FillerStream, start: int, num_filler: int) -> tuple[list[int], int]:
    """Return what is told and so much filler behind it, and where the telling ends."""
    return told + filler.slice(start, num_filler).tolist(), len(told)


def asked_later(held: Held, filler: FillerStream, start: int, end_ids: list[int]) -> Drawn:
    """Return a sequence of filler alone that asks for what the passed state holds."""
    assert not isinstance(held, int), "a passkey, which has rows of its own"
    return Drawn(partial(with_filler, [], filler, start), 0, Asked(held, end_ids), None, is_told=False)


def even_rows(drawn: Sequence[Drawn], num_filler: int) -> tuple[list[Row], int]:
    """Return rows of one length, and where the earliest question begins; the longest sequence has `num_filler`."""
    longest = max(one.num_told + len(one.asked.ids) for one in drawn)
    filled = [one.fill(num_filler + longest - one.num_told - len(one.asked.ids)) for one in drawn]
    rows = [one.asked.row(ids, one, num_told) for one, (ids, num_told) in zip(drawn, filled, strict=True)]
    return rows, len(rows[0].ids) - max(len(one.asked.ids) for one in drawn)
