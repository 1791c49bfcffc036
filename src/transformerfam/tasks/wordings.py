"""How a key is told and asked for: the one wording of an evaluation, and the many of a training."""

import functools
import importlib.resources
import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

from transformerfam.errors import TransformerFamError

KEY = "{key}"


@dataclass(frozen=True)
class Wording:
    """Sentences that tell a key and ask for it.

    Raises:
        TransformerFamError: `{key}` is missing where it has to be, or is in the question.
    """

    intro: str
    """What tells the key, with `{key}` at least once."""
    question: str
    """What asks for it."""
    answer: str
    """What a reader says, with `{key}` once; what precedes it is given with the question."""
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
        """Return the sentences that tell a key."""
        return self.intro.replace(KEY, str(key))

    @classmethod
    def load(cls, path: str | Path) -> "Wording":
        """Read a TOML file with `intro`, `question` and `answer`.

        Raises:
            TransformerFamError: it cannot be read, a key is missing or unknown, or `{key}` is not where it has to be.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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


@dataclass(frozen=True)
class WordingBank:
    """Names of keys, and sentences with `{name}` and `{key}` that tell and ask for them: the material of a training."""

    nouns: list[str]
    owners: list[str]
    intros: list[str]
    changes: list[str]
    """What tells that a key replaces another."""
    questions: list[list[str]]
    """Pairs of a question and an answer."""
    distractors: list[str]
    """Sentences with a `{number}` that nobody asks for."""

    @staticmethod
    @functools.cache
    def load() -> "WordingBank":
        """Return the bank of the package."""
        resource = importlib.resources.files("transformerfam") / "data" / "key_wordings.toml"
        return WordingBank(**tomllib.loads(resource.read_text(encoding="utf-8")))

    def draw_names(self, draw: random.Random, count: int) -> list[str]:
        """Return different names: a third without an owner, as far as one noun is not used twice alone."""
        names: list[str] = []
        while len(names) < count:
            noun = draw.choice(self.nouns)
            name = noun if draw.random() < 1 / 3 else f"{noun} {draw.choice(self.owners)}"
            if not any(name.startswith(other) or other.startswith(name) for other in names):
                names.append(name)
        return names

    def draw_wording(self, draw: random.Random, name: str, is_change: bool = False) -> Wording:
        """Return a wording for a name.

        Args:
            draw: source of chance.
            name: what the key is called.
            is_change: whether the key replaces another one.
        """
        intro = draw.choice(self.changes if is_change else self.intros)
        question, answer = draw.choice(self.questions)
        intro, question, answer = (text.replace("{name}", name) for text in (intro, question, answer))
        return Wording(intro, question, answer, name)

    def draw_distractor(self, draw: random.Random) -> str:
        """Return a sentence with another number."""
        digits = draw.randint(1, 5)
        number = draw.randint(10 ** (digits - 1), 10**digits - 1)
        return draw.choice(self.distractors).replace("{number}", str(number))
