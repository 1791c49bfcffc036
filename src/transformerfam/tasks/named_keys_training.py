"""Training on named keys: several keys, each with a name, and questions for some of them."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

from pydantic import model_validator

from transformerfam.tasks.batch import Held, Written
from transformerfam.tasks.named_keys import NAMES, NamedKeysText, draw_named_keys
from transformerfam.tasks.question import Question
from transformerfam.tasks.ranges import Limits, LimitsFrom1
from transformerfam.tasks.section import require
from transformerfam.tasks.writing import Asked, Drawn, KeySection, Writer, asked_later, even_rows, with_filler


class SeveralKeysSection(KeySection):
    """What the two tasks with several keys share."""

    named_keys: LimitsFrom1
    """Least and most keys that a sequence gives, each by a name; every step draws one number, and the questions are for
    some of them."""
    keys_asked: LimitsFrom1 = (1, 1)
    """Least and most of the keys that a sequence queries, one after the other, each a key to predict. A row counts as
    right when all of them are."""
    retold_keys: Limits = (0, 0)
    """Least and most of the names that are given a second key, which counts."""
    keys_apart: Limits = (0, 0)
    """Least and most tokens of filler between two keys."""

    @model_validator(mode="after")
    def _require_enough(self) -> Self:
        low, high = self.named_keys
        require(high <= len(NAMES), f"data.named_keys is [{low}, {high}], required is 1 to {len(NAMES)}")
        digits, told = self.key_digits[0], high + self.retold_keys[1]
        require(
            told <= 9 * 10 ** (digits - 1),
            f"data.named_keys and data.retold_keys give up to {told} different keys of {digits} digits, of which there "
            f"are {9 * 10 ** (digits - 1)}; set data.key_digits higher",
        )
        return self


class NamedKeysSection(SeveralKeysSection):
    """Several keys, each with a name in one sentence; every step draws their number and that of the questions."""

    task: Literal["named-keys"] = "named-keys"
    """Several keys, each given by a name in one sentence."""


class NamedKeysWriter(Writer[NamedKeysSection]):
    """Give several keys, each by a name, and query some of them; see `Writer`."""

    def __init__(self, section: NamedKeysSection, tokenizer: Any, seed: int, ask_later: float) -> None:
        """Tokenise the sentences; arguments and errors are those of `Writer`."""
        super().__init__(section, tokenizer, seed, ask_later)
        self.text = NamedKeysText(tokenizer)
        self.filler, self.wording_ids = self.text.filler, self.text.wording_ids

    def rows(
        self, draw: random.Random, step: int, num_filler: int, section: NamedKeysSection, carried: Sequence[Held | None]
    ) -> Written:
        """Write the rows of a step, with filler after the last key; see `Writer.rows`."""
        draw, text = random.Random(f"{self.seed}/{step}/named"), self.text
        num_told = draw.randint(*section.named_keys)
        num_retold = min(num_told, draw.randint(*section.retold_keys))
        num_prefix = draw.randint(*section.prefix_tokens)
        num_asked = min(num_told, draw.randint(*section.keys_asked))
        num_digits = draw.randint(*section.key_digits)
        later, drawn = random.Random(f"{self.seed}/{step}/later"), []
        for held in carried:
            keys = draw_named_keys(draw, num_told, num_retold, section.keys_apart, num_digits, section.few_digits)
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
