"""Rows of the tasks with more than one key, named keys and facts, and rows that repeat themselves.

All rows of a step have one length.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformerfam.tasks.facts import FactsText, Story, draw_story
from transformerfam.tasks.named_keys import NamedKeysText, draw_named_keys
from transformerfam.tasks.passkey import FillerStream
from transformerfam.training.recipe import Recipe
from transformerfam.training.sections import Stage


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
    earlier_answers: tuple[range, ...] = ()
    """Where the answers of further questions stand, in front of the last one."""


class NamedRows:
    """Tell several keys, each by a name, and ask for some of them."""

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.data, self.schedule = recipe.data, recipe.schedule
        self.text = NamedKeysText(tokenizer)

    def rows(self, step: int, num_filler: int, stage: Stage) -> tuple[list[Row], int]:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler behind the last key that is told, in the row with the longest sentences.
            stage: of the curriculum.

        Returns:
            The rows, and where the earliest question begins.
        """
        draw, text = random.Random(f"{self.schedule.seed}/{step}/named"), self.text
        num_told = draw.randint(*(stage.named_keys or self.data.named_keys))
        num_retold = min(num_told, draw.randint(*self.data.retold_keys))
        num_prefix = draw.randint(*self.data.prefix_tokens)
        num_asked = min(num_told, draw.randint(*self.data.keys_asked))
        num_digits = draw.randint(*(stage.key_digits or self.data.key_digits))
        drawn = []
        for _ in range(self.schedule.batch_size):
            keys = draw_named_keys(draw, num_told, num_retold, self.data.keys_apart, num_digits)
            names = draw.sample(list(keys.newest), num_asked)
            start = draw.randrange(1 << 30)
            before = text.filler.slice(start, num_prefix).tolist() + text.intro_ids(keys, start + num_prefix)
            pairs = [(text.question_ids(name), text.key_ids(keys.newest[name])) for name in names]
            fill = partial(self._with_filler, before, start + len(before))
            drawn.append(_Drawn(fill, len(before), _Asked(pairs, text.end_ids), keys.newest[names[-1]]))
        return _even_rows(drawn, num_filler)

    def _with_filler(self, before: list[int], start: int, num_filler: int) -> list[int]:
        return before + self.text.filler.slice(start, num_filler).tolist()


class FactRows:
    """Hide a story in filler, and ask a question on it."""

    def __init__(self, recipe: Recipe, tokenizer: Any, filler: str) -> None:
        self.data, self.schedule = recipe.data, recipe.schedule
        self.text = FactsText(tokenizer, filler)

    def rows(self, step: int, num_filler: int, stage: Stage) -> tuple[list[Row], int]:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler in all, in the row with the longest story.
            stage: of the curriculum.

        Returns:
            The rows, and where the earliest question begins.
        """
        draw = random.Random(f"{self.schedule.seed}/{step}/facts")
        num_supports = draw.randint(*(stage.facts or self.data.facts))
        num_sentences = draw.randint(*(stage.fact_sentences or self.data.fact_sentences))
        num_asked, end_ids = draw.randint(*self.data.facts_asked), self.text.encode(".")
        drawn = []
        for _ in range(self.schedule.batch_size):
            story = draw_story(draw, num_supports, num_sentences)
            chosen = draw.sample(story.further, min(num_asked - 1, len(story.further)))
            pairs = [*chosen, (story.question, story.answer)]
            asked = _Asked([(self.text.encode(q), self.text.encode(a)) for q, a in pairs], end_ids)
            num_told = sum(len(self.text.encode(sentence)) for sentence in story.sentences)
            drawn.append(_Drawn(partial(self._hidden, story, draw), num_told, asked, None))
        return _even_rows(drawn, num_filler)

    def _hidden(self, story: Story, draw: random.Random, num_filler: int) -> list[int]:
        ids: list[int] = self.text.hide(story, num_filler, draw).ids_T.tolist()
        return ids


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

    @cached_property
    def vocabulary(self) -> list[int]:
        """All tokens but the special ones."""
        return sorted(set(range(len(self.tokenizer))) - set(self.tokenizer.all_special_ids))

    def rows(self, step: int, num_filler: int, stage: Stage) -> tuple[list[Row], int]:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler between the first time and the second.
            stage: of the curriculum, with `repeated_tokens`.

        Returns:
            The rows, and where the second time begins.
        """
        assert stage.repeated_tokens is not None
        draw = random.Random(f"{self.schedule.seed}/{step}/repeated")
        length = draw.randint(*stage.repeated_tokens)
        rows = []
        for _ in range(self.schedule.batch_size):
            words = draw.sample(self.vocabulary, min(draw.randint(*self.NUM_WORDS), len(self.vocabulary)))
            ids = draw.choices(words, k=length)
            filler = self.filler.slice(draw.randrange(1 << 30), num_filler).tolist()
            rows.append(Row(ids + filler + ids, length - self.NUM_FREE, None, is_told=True))
        return rows, length + num_filler


class _Asked:
    """Questions with their answers, one after the other.

    Args:
        pairs: tokens of every question, and of its answer.
        end_ids: what stands between an answer and the next question.
    """

    def __init__(self, pairs: Sequence[tuple[list[int], list[int]]], end_ids: list[int]) -> None:
        self.ids: list[int] = []
        self.answers: list[range] = []
        for question_ids, answer_ids in pairs:
            self.ids += (end_ids if self.ids else []) + question_ids
            self.answers.append(range(len(self.ids), len(self.ids) + len(answer_ids)))
            self.ids += answer_ids

    def row(self, before: list[int], key: int | None) -> Row:
        """Return the row that asks them behind a text."""
        places = [range(len(before) + answer.start, len(before) + answer.stop) for answer in self.answers]
        return Row(before + self.ids, len(places[-1]), key, is_told=True, earlier_answers=tuple(places[:-1]))


@dataclass(frozen=True)
class _Drawn:
    """One sequence before its filler is counted out."""

    fill: Callable[[int], list[int]]
    """Gives everything in front of the questions, with so many tokens of filler."""
    num_told: int
    """Tokens in front of the questions without filler."""
    asked: _Asked
    key: int | None


def _even_rows(drawn: Sequence[_Drawn], num_filler: int) -> tuple[list[Row], int]:
    """Return rows of one length, and where the earliest question begins; the longest sequence has `num_filler`."""
    longest = max(one.num_told + len(one.asked.ids) for one in drawn)
    rows = [one.asked.row(one.fill(num_filler + longest - one.num_told - len(one.asked.ids)), one.key) for one in drawn]
    return rows, len(rows[0].ids) - max(len(one.asked.ids) for one in drawn)


def told_rows_of(recipe: Recipe, tokenizer: Any) -> NamedRows | FactRows | None:
    """Return what writes a recipe's rows, None where they are passkeys of one key."""
    if recipe.data.named_keys[1]:
        return NamedRows(recipe, tokenizer)
    if recipe.data.facts[1]:
        return FactRows(recipe, tokenizer, recipe.data.fact_filler)
    return None
