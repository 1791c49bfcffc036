"""Rows that tell several keys in many wordings, anywhere in a text, once or more often, and ask for some of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformerfam.tasks.passkey import FillerStream, PasskeyText
from transformerfam.tasks.text import encode
from transformerfam.tasks.wordings import KEY, Wording, WordingBank
from transformerfam.training.recipe import Recipe
from transformerfam.training.sections import Stage
from transformerfam.training.told_rows import Asked, Drawn, Held, Row, asked_later, even_rows, with_filler


@dataclass(frozen=True)
class _Told:
    """One sentence that tells a key."""

    name: str
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
        told = self._tellings(draw, stage)
        newest = {one.name: one for one in told}
        ids = filler.slice(start, draw.randint(*(stage.prefix_tokens or data.prefix_tokens))).tolist()
        for number, one in enumerate(told):
            if number:
                ids += filler.slice(start + len(ids), draw.randint(*data.keys_apart)).tolist()
            if draw.random() < data.other_numbers:
                ids += self._encode(self.bank.draw_distractor(draw))
            ids += self._encode(one.wording.told(one.key))
        names = draw.sample(list(newest), min(len(newest), draw.randint(*data.keys_asked)))
        asked = [newest[name] for name in names]
        pairs = []
        for one in asked:
            wording = self.bank.draw_wording(draw, one.name)
            pairs.append((self._encode(wording.asked), self._key_ids(wording, one.key)))
        tellings = [tuple(self._encode(one.wording.told(one.key))) for one in asked]
        fill = partial(with_filler, ids, filler, start + len(ids))
        return Drawn(fill, len(ids), Asked(pairs, self._encode("."), tellings), asked[-1].key)

    def _tellings(self, draw: random.Random, stage: Stage) -> list[_Told]:
        """Draw what is told, in order: every name once or more often, some again with another key."""
        data = self.data
        names = self.bank.draw_names(draw, draw.randint(*(stage.named_keys or data.named_keys)))
        retold = set(draw.sample(names, min(len(names), draw.randint(*data.retold_keys))))
        queues: list[list[_Told]] = []
        for name in names:
            digits = draw.randint(*(stage.key_digits or data.key_digits))
            keys = draw.sample(range(10 ** (digits - 1), 10**digits), 2 if name in retold else 1)
            queue = []
            for number, key in enumerate(keys):
                for mention in range(draw.randint(*data.mentions)):
                    is_change = number > 0 and mention == 0
                    queue.append(_Told(name, key, self.bank.draw_wording(draw, name, is_change)))
            queues.append(queue)
        told = []
        while queues:  # in any order, but each name's own stay in theirs
            queue = draw.choices(queues, [len(queue) for queue in queues])[0]
            told.append(queue.pop(0))
            queues = [queue for queue in queues if queue]
        return told

    def _encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def _key_ids(self, wording: Wording, key: int) -> list[int]:
        """Return the key's tokens as they stand in the answer."""
        assert wording.answer.split(KEY)[0].endswith(" ")
        return self.text.key_ids(key)


def _plain(filler: FillerStream, start: int, num_tokens: int) -> tuple[list[int], int]:
    return filler.slice(start, num_tokens).tolist(), 0
