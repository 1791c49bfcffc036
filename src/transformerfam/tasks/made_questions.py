"""Questions that are made: lines of a questions file, each with as much text as fits a length."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.text import encode, encode_rest, start_ids

MANY_TRIES = 16
"""Texts that are written for one item before their sizes are halved, not interpolated."""
CUT = re.compile(r"(?<=[.!?:]) (?=[\w\"'(])")
"""Spaces between two words, where tokenizers do not join: pieces are about sentences, of which many come again."""
PROBE_UNITS = 64
"""Of text by which it is seen whether a tokenizer joins pieces."""
MOST_PIECES = 500_000
"""Whose tokens are remembered."""


@dataclass(frozen=True, kw_only=True)
class MadeQuestion:
    """A line of a questions file; the fields are those of `tasks.answers.Item`."""

    text: str
    prompt: str
    question: str
    answers: Sequence[str]
    scorer: str
    max_new_tokens: int
    id: str = ""
    group: str = ""
    depth: float | None = None
    first_line: bool = False
    choices: Sequence[str] = ()

    def line(self) -> str:
        """Return it as JSON, without fields that have no value."""
        values = {n: v for n, v in asdict(self).items() if v is not None and v is not False and v not in ("", ())}
        return json.dumps(values, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Fitted:
    """A question in its length.

    Attributes:
        question: what is asked.
        size: units of its text: words, sentences, documents.
        num_tokens: its length.
    """

    question: MadeQuestion
    size: int
    num_tokens: int


Write = Callable[[int], MadeQuestion]
"""Writes an item with so many units of text; the rest of it is the same for every size."""
Prepare = Callable[[int, tuple[int, int], random.Random], tuple[Write, int, int | None]]
"""Draws an item from the tokens of its text, its number and that of all items, and a source of chance; returns what
writes it, and the least and the most units of text (None: any number)."""


class Lengths:
    """Lengths in the tokens of a model: the text, the prompt, and room for the answer, as an evaluation reads them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}  # tokens of pieces, most of which are in many texts
        self._num_start = len(start_ids(tokenizer))
        self._encode = encode_rest if self._num_start else encode  # the same, and much faster for short texts

    def of(self, question: MadeQuestion) -> int:
        """Return the tokens of an item."""
        parts = (self._encode(self._tokenizer, part) for part in (question.text, question.prompt))
        return self._num_start + sum(map(len, parts)) + question.max_new_tokens

    def by_pieces(self, question: MadeQuestion) -> int:
        """Return the sum of the tokens of its pieces: with most tokenizers what `of` returns, and many times faster."""
        first, *others = CUT.split(question.text)
        pieces = [first, *(f" {piece}" for piece in others), question.prompt]
        if len(self._known) > MOST_PIECES:
            self._known.clear()
        if new := [piece for piece in dict.fromkeys(pieces) if piece not in self._known]:
            ids = self._tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
            self._known.update(zip(new, map(len, ids), strict=True))
        return self._num_start + sum(self._known[piece] for piece in pieces) + question.max_new_tokens

    def fit(
        self, write: Write, num_tokens: int, least: int, most: int | None = None, near: int | None = None
    ) -> Fitted:
        """Return the item with the most text that is no longer than `num_tokens`.

        With a tokenizer that joins some pieces, and only in some texts, there may be room for a little more.

        Args:
            write: writes it.
            num_tokens: the length.
            least: units of text that it needs.
            most: units that there are; None: any number.
            near: a size to try first, that of an item like it.

        Raises:
            TransformerFamError: it is longer with the least text, or shorter with all there is.
        """
        sizes = (num_tokens, least, most)
        sample = write(least + PROBE_UNITS if most is None else min(least + PROBE_UNITS, most))
        if self.by_pieces(sample) == self.of(sample):
            found = _search(write, self.by_pieces, *sizes, near)
            if self.of(found.question) == found.num_tokens:
                return found
            near = found.size
        return _search(write, self.of, *sizes, near)


def _search(
    write: Write,
    length_of: Callable[[MadeQuestion], int],
    num_tokens: int,
    least: int,
    most: int | None,
    near: int | None,
) -> Fitted:
    """Look for the largest size that fits, by interpolation; arguments and errors are those of `Lengths.fit`."""

    def written(size: int) -> Fitted:
        question = write(size)
        return Fitted(question, size, length_of(question))

    low = written(least)
    if low.num_tokens > num_tokens:
        raise TransformerFamError(
            f"a text of {num_tokens:,} tokens is too short, required are about {round(1.05 * low.num_tokens):,}"
        )
    high: Fitted | None = None
    ceiling = (num_tokens if most is None else most) + 1
    tries, size = 0, near or max(least + 1, least + (num_tokens - low.num_tokens) // 8)
    while (top := high.size if high else ceiling) - low.size > 1:
        size = (low.size + top) // 2 if tries > MANY_TRIES else size
        found = written(min(max(size, low.size + 1), top - 1))
        slope = max((found.num_tokens - low.num_tokens) / (found.size - low.size), 1e-3)
        if found.num_tokens <= num_tokens:
            low = found
        else:
            high = found
        size, tries = low.size + int((num_tokens - low.num_tokens) / slope), tries + 1
    if low.size == most:
        raise TransformerFamError(
            f"a text of {num_tokens:,} tokens is too long, there is text for fewer than {low.num_tokens:,} here"
        )
    return low


@dataclass(frozen=True, kw_only=True)
class MadeTask:
    """A task of a benchmark.

    Attributes:
        name: as people quote it.
        prepare: draws an item.
    """

    name: str
    prepare: Prepare


def make_questions(
    task: MadeTask, lengths: Lengths, num_tokens: int, num_items: int, seed: int
) -> Iterator[MadeQuestion]:
    """Yield the items of a task in one length, the same for the same seed.

    Args:
        task: which.
        lengths: in the tokens of the model that is asked.
        num_tokens: of every item at most.
        num_items: how many.
        seed: of all that is drawn.

    Raises:
        TransformerFamError: the length is too short or too long for the task.
    """
    near = None
    for number in range(num_items):
        draw = random.Random(f"{seed}/{task.name}/{num_tokens}/{number}")
        write, least, most = task.prepare(num_tokens, (number, num_items), draw)
        try:
            fitted = lengths.fit(write, num_tokens, least, most, near)
        except TransformerFamError as error:
            raise TransformerFamError(f"{task.name}: {error}; change --tokens") from error
        near = fitted.size
        made = asdict(fitted.question)
        named = {"id": f"{task.name} {num_tokens} {number}", "group": f"{task.name}, {num_tokens:,} tokens"}
        yield MadeQuestion(**made | {**named, "group": named["group"] + made["group"]})
