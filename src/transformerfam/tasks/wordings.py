"""How a key is given and queried: the one wording of an evaluation, and the many of a training."""

import functools
import importlib.resources
import random
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from transformerfam.errors import TransformerFamError
from transformerfam.files.reading import parse_toml, read_whole

KEY = "{key}"


@dataclass(frozen=True)
class Wording:
    """Sentences that give a key and query it.

    Raises:
        TransformerFamError: `{key}` is missing where it has to be, or is in the question.
    """

    intro: str
    """What gives the key, with `{key}` at least once."""
    question: str
    """The question for it."""
    answer: str
    """The answer, with `{key}` once; what precedes it is given with the question."""
    name: str = "wording"
    """What rows call it."""

    def __post_init__(self) -> None:
        for part, (least, most) in {"intro": (1, 99), "question": (0, 0), "answer": (1, 1)}.items():
            text = getattr(self, part)
            if not least <= text.count(KEY) <= most:
                required = "no {key}" if most == 0 else "{key} once" if most == 1 else "at least one {key}"
                raise TransformerFamError(
                    f"the {part} of the wording {self.name!r} is {text!r}, required is {required}; change {part}"
                )

    @property
    def asked(self) -> str:
        """The question and what precedes the key in the answer, without a space at the end."""
        return (self.question + self.answer.split(KEY)[0]).rstrip(" ")

    def told(self, key: int | str) -> str:
        """Return the sentences that give a key."""
        return self.intro.replace(KEY, str(key))

    @classmethod
    def load(cls, path: str | Path) -> "Wording":
        """Read a TOML file with `intro`, `question` and `answer`.

        Raises:
            TransformerFamError: it cannot be read, a key is missing or unknown, or `{key}` is not where it has to be.
        """
        try:
            values = parse_toml(read_whole(path))
        except (OSError, ValueError) as error:
            raise TransformerFamError(
                f"cannot read the wording {str(path)!r} ({error}); required is a TOML file with intro, question, answer"
            ) from error
        wanted = ("intro", "question", "answer")
        if set(values) != set(wanted) or not all(isinstance(value, str) for value in values.values()):
            raise TransformerFamError(
                f"the wording {str(path)!r} has {', '.join(values) or 'nothing'}, required are intro, question and "
                "answer, each a text in quotes"
            )
        return cls(**values, name=Path(path).stem)


class Topic(Protocol):
    """What a key belongs to; the text gives it and the question names it by this."""

    @property
    def name(self) -> str:
        """What distinguishes the topics of a sequence."""

    def wording(self, draw: random.Random, is_change: bool = False) -> Wording:
        """Return a wording.

        Args:
            draw: source of chance.
            is_change: whether the key replaces another one.
        """


@dataclass(frozen=True)
class Name:
    """A name, for which every sentence of the bank has a place."""

    bank: "WordingBank"
    name: str

    def wording(self, draw: random.Random, is_change: bool = False) -> Wording:
        """Return any of the bank's sentences and questions."""
        intro = draw.choice(self.bank.changes if is_change else self.bank.intros)
        question, answer = draw.choice(self.bank.questions)
        intro, question, answer = (text.replace("{name}", self.name) for text in (intro, question, answer))
        return Wording(intro, question, answer, self.name)


@dataclass(frozen=True)
class Scene:
    """A key in words that no other key has."""

    bank: "WordingBank"
    scene: list[str]

    @property
    def name(self) -> str:
        """The sentence that gives it."""
        return self.scene[0]

    def wording(self, draw: random.Random, is_change: bool = False) -> Wording:
        """Return the scene's one wording; a change says that it is one."""
        intro, question, answer = self.scene
        return Wording(self.bank.draw_change(draw, is_change) + intro, question, answer, "scene")


@dataclass(frozen=True)
class Passage:
    """Words of a book with a key after them, which the last of these words query."""

    bank: "WordingBank"
    name: str
    MIN_WORDS: ClassVar = 3
    """Fewest words that query it."""

    def wording(self, draw: random.Random, is_change: bool = False) -> Wording:
        """Return a wording that gives the key after all words, and queries it by some of them."""
        words = self.name.split(" ")
        asked = " ".join(words[draw.randint(0, len(words) - self.MIN_WORDS) :])
        change = self.bank.draw_change(draw, is_change)
        question, answer = draw.choice(self.bank.passage_questions)
        return Wording(
            change + draw.choice(self.bank.passage_intros).replace("{passage}", self.name),
            question,
            answer.replace("{passage}", asked),
            "passage",
        )


@dataclass(frozen=True)
class WordingBank:
    """Names of keys, and sentences with `{name}` and `{key}` that give and query them: the material of a training."""

    nouns: list[str]
    owners: list[str]
    intros: list[str]
    changes: list[str]
    """The sentence that replaces a key by another."""
    questions: list[list[str]]
    """Pairs of a question and an answer."""
    distractors: list[str]
    """Sentences with a `{number}` that no question is about."""
    scenes: list[list[str]]
    """Triples of a sentence that gives a key, a question and an answer, each in words that no other has."""
    scene_changes: list[str]
    """What precedes a scene or a passage that replaces a key."""
    passage_intros: list[str]
    """The sentence that gives a key after a `{passage}`."""
    passage_questions: list[list[str]]
    """Pairs of a question and an answer with a `{passage}`."""

    @staticmethod
    @functools.cache
    def load() -> "WordingBank":
        """Return the bank of the package."""
        resource = importlib.resources.files("transformerfam") / "data" / "key_wordings.toml"
        return WordingBank(**parse_toml(resource.read_bytes()))

    def draw_names(self, draw: random.Random, count: int) -> list[Name]:
        """Return different names: a third without an owner, as far as one noun is not used twice alone."""
        names: list[str] = []
        while len(names) < count:
            noun = draw.choice(self.nouns)
            name = noun if draw.random() < 1 / 3 else f"{noun} {draw.choice(self.owners)}"
            if not any(name.startswith(other) or other.startswith(name) for other in names):
                names.append(name)
        return [Name(self, name) for name in names]

    def draw_scenes(self, draw: random.Random, count: int) -> list[Scene]:
        """Return different scenes."""
        return [Scene(self, scene) for scene in draw.sample(self.scenes, count)]

    def draw_change(self, draw: random.Random, is_change: bool) -> str:
        """Return what precedes a scene or a passage: nothing, unless it replaces a key."""
        return draw.choice(self.scene_changes) if is_change else ""

    def draw_distractor(self, draw: random.Random) -> str:
        """Return a sentence with another number."""
        digits = draw.randint(1, 5)
        number = draw.randint(10 ** (digits - 1), 10**digits - 1)
        return draw.choice(self.distractors).replace("{number}", str(number))
