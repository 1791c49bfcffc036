"""Training on worded keys: keys in many wordings, anywhere in a text, once or more often, and questions for some."""

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from transformerfam.errors import RecipeError
from transformerfam.tasks.batch import Held, Written
from transformerfam.tasks.filler import FillerStream
from transformerfam.tasks.named_keys import draw_keys
from transformerfam.tasks.named_keys_training import SeveralKeysSection
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tasks.question import Question
from transformerfam.tasks.ranges import LimitsFrom1, NotNegative, Number, Share
from transformerfam.tasks.section import require
from transformerfam.tasks.text import encode
from transformerfam.tasks.wordings import KEY, Passage, Topic, Wording, WordingBank
from transformerfam.tasks.writing import Asked, Drawn, Writer, asked_later, even_rows, load_books, with_filler

PASSAGE_WORDS = (4, 12)
"""Least and most words of a passage that gives a key."""


class WordedKeysSection(SeveralKeysSection):
    """Keys given in the many wordings and names of `data/key_wordings.toml`; every row draws how many."""

    can_be_taught: ClassVar[bool] = True
    fixed_keys: ClassVar[tuple[str, ...]] = (*SeveralKeysSection.fixed_keys, "books")
    folder_keys: ClassVar[tuple[str, ...]] = ("books",)

    task: Literal["worded-keys"] = "worded-keys"
    """Several keys, given in many wordings."""
    books: str | None = None
    """Folder of UTF-8 `.txt` files in which the keys are hidden; without it they are hidden in the passkey's filler."""
    book: NotNegative = 0.0
    """Share of the sequences of text without a key."""
    scenes: Number = 0.0
    """Share of the keys that are given in a sentence with words that no other key has, and not by a name."""
    passages: Number = 0.0
    """Share of the keys that follow words of the text they are hidden in; the last of these words query them."""
    mentions: LimitsFrom1 = (1, 1)
    """Least and most times that each key is given; every key draws one number."""
    other_numbers: Share = 0.0
    """Share of the sentences with a key that follow a sentence with another number."""

    @model_validator(mode="after")
    def _require_shares(self) -> Self:
        require(
            self.books is not None or self.book == 0,
            "data.book is above 0, required is a folder of .txt files; set data.books",
        )
        require(
            min(self.scenes, self.passages) >= 0 and self.scenes + self.passages <= 1,
            f"data.scenes is {self.scenes} and data.passages {self.passages}, required are shares of 0 or more with a "
            "sum of at most 1",
        )
        return self


@dataclass(frozen=True)
class _Told:
    """One sentence that gives a key."""

    topic: Topic
    key: int
    wording: Wording


class WordedKeysWriter(Writer[WordedKeysSection]):
    """Give keys in the wordings of the package's bank, between text with other numbers, and query some."""

    def __init__(self, section: WordedKeysSection, tokenizer: Any, seed: int, ask_later: float) -> None:
        """Tokenise the filler; arguments and errors are those of `Writer`."""
        super().__init__(section, tokenizer, seed, ask_later)
        book = load_books(tokenizer, section.books) if section.books else None
        self.text = PasskeyText(tokenizer, book or "sentences")
        self.filler, self.bank = self.text.filler, WordingBank.load()
        self.read = [book] if book else []
        bank, scenes = self.bank, self.bank.scenes if section.scenes else []
        texts = [*bank.intros, *itertools.chain(*bank.questions), *itertools.chain(*scenes)]
        self.wording_ids = [i for text in texts for i in self._encode(re.sub(r"{\w+}", "", text))]

    def rows(
        self,
        draw: random.Random,
        step: int,
        num_filler: int,
        section: WordedKeysSection,
        carried: Sequence[Held | None],
    ) -> Written:
        """Write the rows of a step, with filler after the last key; see `Writer.rows`."""
        draw = random.Random(f"{self.seed}/{step}/worded")
        later, drawn = random.Random(f"{self.seed}/{step}/later"), []
        for held in carried:
            filler, start = draw.choice([self.filler]), draw.randrange(1 << 30)
            if draw.random() < section.book:
                drawn.append(Drawn(partial(_plain, filler, start), 0, Asked([], []), None, is_told=False))
            elif later.random() < self.ask_later and held is not None:
                drawn.append(asked_later(held, filler, start, []))
            else:
                drawn.append(self._drawn(draw, section, filler, start))
        return even_rows(drawn, num_filler)

    def _drawn(self, draw: random.Random, section: WordedKeysSection, filler: FillerStream, start: int) -> Drawn:
        told = self._tellings(draw, section, filler)
        newest = {one.topic.name: one for one in told}
        ids = filler.slice(start, draw.randint(*section.prefix_tokens)).tolist()
        for number, one in enumerate(told):
            if number:
                ids += filler.slice(start + len(ids), draw.randint(*section.keys_apart)).tolist()
            if draw.random() < section.other_numbers:
                ids += self._encode(self.bank.draw_distractor(draw))
            ids += self._encode(one.wording.told(one.key))
        names = draw.sample(list(newest), min(len(newest), draw.randint(*section.keys_asked)))
        asked = [newest[name] for name in names]
        questions = []
        for one in asked:
            wording, telling_ids = one.topic.wording(draw), self._encode(one.wording.told(one.key))
            questions.append(Question.of(self._encode(wording.asked), self._key_ids(wording, one.key), telling_ids))
        fill = partial(with_filler, ids, filler, start + len(ids))
        return Drawn(fill, len(ids), Asked(questions, self._encode(".")), asked[-1].key)

    def _tellings(self, draw: random.Random, section: WordedKeysSection, filler: FillerStream) -> list[_Told]:
        """Draw the keys in order: every topic once or more often, some again with another key."""
        topics = self._topics(draw, section, draw.randint(*section.named_keys), filler)
        retold = draw.sample(range(len(topics)), min(len(topics), draw.randint(*section.retold_keys)))
        queues: list[list[_Told]] = []
        for place, topic in enumerate(topics):
            digits = draw.randint(*section.key_digits)
            keys = draw_keys(draw, 2 if place in retold else 1, digits, section.few_digits)
            queue = []
            for number, key in enumerate(keys):
                for mention in range(draw.randint(*section.mentions)):
                    is_change = number > 0 and mention == 0
                    queue.append(_Told(topic, key, topic.wording(draw, is_change)))
            queues.append(queue)
        told = []
        while queues:  # in any order, but each topic's own stay in theirs
            queue = draw.choices(queues, [len(queue) for queue in queues])[0]
            told.append(queue.pop(0))
            queues = [queue for queue in queues if queue]
        return told

    def _topics(self, draw: random.Random, section: WordedKeysSection, count: int, filler: FillerStream) -> list[Topic]:
        """Draw different topics, of every kind as often as its share says."""
        names, scenes = self.bank.draw_names(draw, count), self.bank.draw_scenes(draw, count)
        topics: list[Topic] = []
        for name, scene in zip(names, scenes, strict=True):
            kind = draw.random() - section.scenes
            if kind < 0:
                topics.append(scene)
            elif kind < section.passages:
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
        """Return the key's tokens as they are in the answer."""
        assert wording.answer.split(KEY)[0].endswith(" ")
        return self.text.key_ids(key)


def _plain(filler: FillerStream, start: int, num_tokens: int) -> tuple[list[int], int]:
    return filler.slice(start, num_tokens).tolist(), 0
