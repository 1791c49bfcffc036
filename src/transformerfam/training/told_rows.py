"""Rows of the tasks with more than one key: named keys, and facts. All rows of a step have one length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformerfam.tasks.facts import FactsText, draw_story
from transformerfam.tasks.named_keys import NamedKeysText, draw_named_keys
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
        parts = []
        for _ in range(self.schedule.batch_size):
            keys = draw_named_keys(draw, num_told, num_retold, self.data.keys_apart)
            names = draw.sample(list(keys.newest), num_asked)
            start = draw.randrange(1 << 30)
            before = text.filler.slice(start, num_prefix).tolist() + text.intro_ids(keys, start + num_prefix)
            asked, answers = text.asked_ids(names, keys.newest)
            parts.append((before, start + len(before), asked, answers, keys.newest[names[-1]]))
        longest = max(len(before) + len(asked) for before, _, asked, _, _ in parts)
        rows = []
        for before, start, asked, answers, key in parts:
            ids = before + text.filler.slice(start, num_filler + longest - len(before) - len(asked)).tolist()
            places = [range(len(ids) + answer.start, len(ids) + answer.stop) for answer in answers]
            rows.append(Row(ids + asked, len(answers[-1]), key, is_told=True, earlier_answers=tuple(places[:-1])))
        return rows, _question_start(rows, [len(asked) for _, _, asked, _, _ in parts])


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
        stories = [draw_story(draw, num_supports, num_sentences) for _ in range(self.schedule.batch_size)]
        bare = [self.text.hide(story, 0, random.Random(0)) for story in stories]
        lengths = [len(story.ids_T) + len(story.question_ids) + len(story.answer_ids) for story in bare]
        rows = []
        for story, length in zip(stories, lengths, strict=True):
            hidden = self.text.hide(story, num_filler + max(lengths) - length, draw)
            ids = hidden.ids_T.tolist() + hidden.question_ids + hidden.answer_ids
            rows.append(Row(ids, len(hidden.answer_ids), None, is_told=True))
        return rows, _question_start(rows, [len(story.question_ids) + len(story.answer_ids) for story in bare])


def _question_start(rows: Sequence[Row], lengths: Sequence[int]) -> int:
    """Return where the earliest question of rows of one length begins; `lengths` are those from it to the end."""
    return len(rows[0].ids) - max(lengths)


def told_rows_of(recipe: Recipe, tokenizer: Any) -> NamedRows | FactRows | None:
    """Return what writes a recipe's rows, None where they are passkeys of one key."""
    if recipe.data.named_keys[1]:
        return NamedRows(recipe, tokenizer)
    if recipe.data.facts[1]:
        return FactRows(recipe, tokenizer, recipe.data.fact_filler)
    return None
