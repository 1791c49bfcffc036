"""Rows that tell several keys in many wordings, anywhere in a text, once or more often, and ask for some of them."""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformerfam.errors import RecipeError
from transformerfam.tasks.named_keys import draw_keys
from transformerfam.tasks.passkey import FillerStream, PasskeyText
from transformerfam.tasks.question import Question
from transformerfam.tasks.text import encode
from transformerfam.tasks.wordings import KEY, Passage, Topic, Wording, WordingBank
from transformerfam.training.data.told_rows import Asked, Drawn, Held, Row, asked_later, even_rows, with_filler
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.sections import Stage

PASSAGE_WORDS = (4, 12)
"""Least and most words of a passage that tells a key."""


@dataclass(frozen=True)
class _Told:
    """One sentence that tells a key."""

    topic: Topic
    key: int
    wording: Wording


class WordedRows:
    """Tell keys by names, in the wordings of the package's bank, between text with other numbers, and ask for some."""

    def __init__(self, recipe: Recipe, tokenizer: Any, filler: Sequence[FillerStream]) -> None:
        """Keep what rows are made of.

        Args:
            recipe: the recipe.
            tokenizer: its tokenizer.
            filler: what keys are told in; each row takes one.
        """
        self.data, self.seed = recipe.data, recipe.schedule.seed
        self.ask_later = recipe.state_passing.ask_later
        self.fillers, self.tokenizer = filler, tokenizer
        self.text = PasskeyText(tokenizer, filler[0])
        self.bank = WordingBank.load()

    @property
    def wording_ids(self) -> list[int]:
        """The tokens of the sentences that tell and ask, of every kind that is drawn."""
        bank, scenes = self.bank, self.bank.scenes if self.data.scenes else []
        texts = [*bank.intros, *itertools.chain(*bank.questions), *itertools.chain(*scenes)]
        return [i for text in texts for i in self._encode(re.sub(r"{\w+}", "", text))]

    def rows(self, step: int, num_filler: int, stage: Stage, carried: Sequence[Held | None]) -> tuple[list[Row], int]:
        """Write the rows of a step; arguments and result are those of `NamedRows.rows`."""
        draw = random.Random(f"{self.seed}/{step}/worded")
        later, drawn = random.Random(f"{self.seed}/{step}/later"), []
        for held in carried:
            filler, start = draw.choice(self.fillers), draw.randrange(1 << 30)
            if draw.random() < self.data.book:
                drawn.append(Drawn(partial(_plain, filler, start), 0, Asked([], []), None, is_told=False))
            elif later.random() < self.ask_later and held is not None:
                drawn.append(asked_later(held, filler, start, []))
            else:
                drawn.append(self._drawn(draw, stage, filler, start))
        return even_rows(drawn, num_filler)

    def _drawn(self, draw: random.Random, stage: Stage, filler: FillerStream, start: int) -> Drawn:
        data = self.data
        told = self._tellings(draw, stage, filler)
        newest = {one.topic.name: one for one in told}
        ids = filler.slice(start, draw.randint(*(stage.prefix_tokens or data.prefix_tokens))).tolist()
        for number, one in enumerate(told):
            if number:
                ids += filler.slice(start + len(ids), draw.randint(*data.keys_apart)).tolist()
            if draw.random() < data.other_numbers:
                ids += self._encode(self.bank.draw_distractor(draw))
            ids += self._encode(one.wording.told(one.key))
        names = draw.sample(list(newest), min(len(newest), draw.randint(*data.keys_asked)))
        asked = [newest[name] for name in names]
        questions = []
        for one in asked:
            wording, telling_ids = one.topic.wording(draw), self._encode(one.wording.told(one.key))
            questions.append(Question.of(self._encode(wording.asked), self._key_ids(wording, one.key), telling_ids))
        fill = partial(with_filler, ids, filler, start + len(ids))
        return Drawn(fill, len(ids), Asked(questions, self._encode(".")), asked[-1].key)

    def _tellings(self, draw: random.Random, stage: Stage, filler: FillerStream) -> list[_Told]:
        """Draw what is told, in order: every topic once or more often, some again with another key."""
        data = self.data
        topics = self._topics(draw, draw.randint(*(stage.named_keys or data.named_keys)), filler)
        retold = draw.sample(range(len(topics)), min(len(topics), draw.randint(*data.retold_keys)))
        queues: list[list[_Told]] = []
        for place, topic in enumerate(topics):
            digits = draw.randint(*(stage.key_digits or data.key_digits))
            keys = draw_keys(draw, 2 if place in retold else 1, digits, data.few_digits)
            queue = []
            for number, key in enumerate(keys):
                for mention in range(draw.randint(*data.mentions)):
                    is_change = number > 0 and mention == 0
                    queue.append(_Told(topic, key, topic.wording(draw, is_change)))
            queues.append(queue)
        told = []
        while queues:  # in any order, but each topic's own stay in theirs
            queue = draw.choices(queues, [len(queue) for queue in queues])[0]
            told.append(queue.pop(0))
            queues = [queue for queue in queues if queue]
        return told

    def _topics(self, draw: random.Random, count: int, filler: FillerStream) -> list[Topic]:
        """Draw different topics, of every kind as often as its share says."""
        names, scenes = self.bank.draw_names(draw, count), self.bank.draw_scenes(draw, count)
        topics: list[Topic] = []
        for name, scene in zip(names, scenes, strict=True):
            kind = draw.random() - self.data.scenes
            if kind < 0:
                topics.append(scene)
            elif kind < self.data.passages:
                topics.append(self._passage(draw, filler))
            else:
                topics.append(name)
        return topics

    def _passage(self, draw: random.Random, filler: FillerStream) -> Passage:
        """Cut words out of a filler, without those that the cut may have torn.

        Raises:
            RecipeError: the filler has too few words.
        """
        low, high = PASSAGE_WORDS
        ids = filler.slice(draw.randrange(1 << 30), 8 * high).tolist()
        words = self.tokenizer.decode(ids).split()[1:-1][: draw.randint(low, high)]
        if len(words) < low:
            raise RecipeError(
                f"the text {filler.name!r} has {len(words)} words in {8 * high} tokens, data.passages requires at "
                f"least {low}; set it to 0"
            )
        return Passage(self.bank, " ".join(words))

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def _key_ids(self, wording: Wording, key: int) -> list[int]:
        """Return the key's tokens as they stand in the answer."""
        assert wording.answer.split(KEY)[0].endswith(" ")
        return self.text.key_ids(key)


def _plain(filler: FillerStream, start: int, num_tokens: int) -> tuple[list[int], int]:
    return filler.slice(start, num_tokens).tolist(), 0
