"""Several keys, distinguished by names: how much does a memory hold, and does it keep the newest?

Several keys are given one after the other, with filler between them; some names may get a second key, which counts.
After the last of them comes filler, and then the question for one name. With one key and one name this is the passkey
task in other words.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.filler import FillerStream
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tasks.text import encode

NAMES = (
    *("grass", "sky", "sun", "text", "info", "information", "lot", "quiz"),
    *("green", "blue", "yellow", "important", "irrelevant", "hidden", "back", "you"),
)
"""Words of the passkey text, so that the tiny model's vocabulary holds them."""

BEFORE_NAME = " The pass key of"
BEFORE_NAMED_KEY = " is"
BEFORE_ASKED_NAME = " What is the pass key of"
BEFORE_ANSWER = "? The pass key of"


@dataclass(frozen=True)
class Telling:
    """One sentence that gives a key.

    Attributes:
        name: number of the name.
        key: the key.
        num_before: tokens of filler in front of it.
    """

    name: int
    key: int
    num_before: int


@dataclass(frozen=True)
class NamedKeys:
    """The keys of one text.

    Attributes:
        tellings: in their order in the text.
    """

    tellings: tuple[Telling, ...]

    @property
    def newest(self) -> dict[int, int]:
        """Return the last key of every name, in the order in which these keys are given."""
        found: dict[int, int] = {}
        for telling in self.tellings:
            found.pop(telling.name, None)
            found[telling.name] = telling.key
        return found

    @property
    def outdated(self) -> dict[int, list[int]]:
        """Return the keys of every name that were given before its last."""
        newest = self.newest
        old: dict[int, list[int]] = {}
        for telling in self.tellings:
            if telling.key != newest[telling.name]:
                old.setdefault(telling.name, []).append(telling.key)
        return old


def draw_key(draw: random.Random, num_digits: int, few_digits: float) -> int:
    """Draw a key.

    Args:
        draw: source of chance.
        num_digits: of the key.
        few_digits: share of keys that are made of two or three different digits.
    """
    if few_digits == 0 or draw.random() >= few_digits:
        return draw.randint(10 ** (num_digits - 1), 10**num_digits - 1)
    digits = draw.sample(range(10), draw.choice((2, 3)))
    first = draw.choice([digit for digit in digits if digit > 0])
    return int("".join(map(str, [first, *draw.choices(digits, k=num_digits - 1)])))


def draw_keys(draw: random.Random, num_keys: int, num_digits: int, few_digits: float) -> list[int]:
    """Draw different keys; other arguments are those of `draw_key`."""
    if few_digits == 0:
        return draw.sample(range(10 ** (num_digits - 1), 10**num_digits), num_keys)
    keys: dict[int, None] = {}
    while len(keys) < num_keys:
        keys[draw_key(draw, num_digits, few_digits)] = None
    return list(keys)


def draw_named_keys(
    draw: random.Random,
    num_told: int,
    num_retold: int = 0,
    apart: tuple[int, int] = (0, 0),
    digits: int = 5,
    few_digits: float = 0.0,
) -> NamedKeys:
    """Draw a text's keys.

    Args:
        draw: source of chance.
        num_told: names, the first so many of `NAMES` in any order.
        num_retold: names that are given a second key, after all others, and in another order.
        apart: least and most tokens of filler in front of a key; the first has none.
        digits: of a key.
        few_digits: as for `draw_key`.

    Raises:
        TransformerFamError: there are not so many names.
    """
    if not 1 <= num_told <= len(NAMES) or not 0 <= num_retold <= num_told:
        raise TransformerFamError(
            f"num_told is {num_told} and num_retold {num_retold}, required is 1 to {len(NAMES)}, and 0 to num_told"
        )
    names = draw.sample(range(num_told), num_told)
    names += draw.sample(names, num_retold)
    keys = draw_keys(draw, len(names), digits, few_digits)
    gaps = [0] + [draw.randint(*apart) for _ in names[1:]]
    return NamedKeys(tuple(Telling(*parts) for parts in zip(names, keys, gaps, strict=True)))


class NamedKeysText:
    """Write texts of named keys for one tokenizer."""

    def __init__(self, tokenizer: Any, filler: str | Path | FillerStream = "sentences") -> None:
        """Tokenise the constant pieces.

        Args:
            tokenizer: a Hugging Face tokenizer.
            filler: as for `PasskeyText`.

        Raises:
            TransformerFamError: the tokenizer has no tokens for digits, or the file cannot be read.
        """
        self.passkey = PasskeyText(tokenizer, filler)
        self.filler, self.start_ids = self.passkey.filler, self.passkey.start_ids
        self.key_ids, self.decode = self.passkey.key_ids, self.passkey.decode
        self._names = [encode(tokenizer, f" {name}") for name in NAMES]
        self._pieces = {
            piece: encode(tokenizer, piece)
            for piece in (BEFORE_NAME, BEFORE_NAMED_KEY, BEFORE_ASKED_NAME, BEFORE_ANSWER)
        } | {"end": encode(tokenizer, ".")}

    @property
    def wording_ids(self) -> list[int]:
        """The tokens of all sentences and names."""
        return [i for ids in (*self._pieces.values(), *self._names) for i in ids]

    @property
    def end_ids(self) -> list[int]:
        """The tokens of a full stop."""
        return self._pieces["end"]

    def told_ids(self, telling: Telling) -> list[int]:
        """Return the sentence that gives a key."""
        piece = self._pieces
        return (
            piece[BEFORE_NAME]
            + self._names[telling.name]
            + piece[BEFORE_NAMED_KEY]
            + self.key_ids(telling.key)
            + piece["end"]
        )

    def question_ids(self, name: int) -> list[int]:
        """Return the question for a name, up to the place where the key has to follow."""
        name_ids, piece = self._names[name], self._pieces
        return piece[BEFORE_ASKED_NAME] + name_ids + piece[BEFORE_ANSWER] + name_ids + piece[BEFORE_NAMED_KEY]

    def intro_ids(self, keys: NamedKeys, filler_start: int = 0) -> list[int]:
        """Return everything up to the end of the last key's sentence.

        Args:
            keys: what the text gives.
            filler_start: first token of the filler that is used.
        """
        ids: list[int] = []
        for telling in keys.tellings:
            ids += self.filler.slice(filler_start, telling.num_before).tolist() + self.told_ids(telling)
            filler_start += telling.num_before
        return ids
