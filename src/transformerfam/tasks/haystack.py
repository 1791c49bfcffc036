"""Text that others are hidden in: words in order, with the places where sentences begin, of any number."""

import random
import re
from collections.abc import Iterator, Sequence

SENTENCE_END = re.compile(r"[.!?][\"'\u2019\u201d)\]_*]*$")
ABBREVIATIONS = frozenset(("Mr.", "Mrs.", "Ms.", "Dr.", "St.", "vs.", "e.g.", "i.e.", "etc."))


class Haystack:
    """A text that repeats, paragraph by paragraph.

    Args:
        text: paragraphs with empty lines between them.
        name: what rows call it where it repeats.
        is_shuffled: whether its paragraphs come in another order each time, once it has to repeat.
    """

    def __init__(self, text: str, name: str, is_shuffled: bool) -> None:
        paragraphs = [words for part in re.split(r"\n\s*\n", text) if (words := part.split())]
        self._paragraphs = [(words, sentence_starts(words)) for words in paragraphs]
        self._is_shuffled = is_shuffled
        self.name = name

    def __len__(self) -> int:
        """Return the number of words after which it repeats."""
        return sum(len(words) for words, _ in self._paragraphs)

    def passage(self, num_words: int, draw: random.Random) -> "Passage":
        """Return a place in the text from which up to `num_words` words can be taken.

        It begins at a paragraph such that they do not repeat, at the first where there are too few; then all
        repetitions, the first too, have their order drawn.
        """
        first, left = 0, len(self) - num_words
        if self._is_shuffled and left > 0:
            starts, place = [], 0
            for number, (words, _) in enumerate(self._paragraphs):
                if place > left:
                    break
                starts.append(number)
                place += len(words)
            first = draw.choice(starts)
        return Passage(self._endless(first, draw.random() if self._is_shuffled and left <= 0 else None))

    def note(self, num_words: int) -> str:
        """Return what rows say of a text of so many words of it."""
        return f", {self.name} repeat" if num_words > len(self) else ""

    def _endless(self, first: int, seed: float | None) -> Iterator[tuple[Sequence[str], Sequence[int]]]:
        yield from self._paragraphs[first:] if seed is None else ()
        order = list(range(len(self._paragraphs)))
        draw = random.Random(seed)
        while True:
            if seed is not None:
                draw.shuffle(order)
            for number in order:
                yield self._paragraphs[number]


class Passage:
    """Words of a text from one place on, any number of them."""

    def __init__(self, paragraphs: Iterator[tuple[Sequence[str], Sequence[int]]]) -> None:
        self._paragraphs = paragraphs
        self._words: list[str] = []
        self._starts: list[int] = []

    def words(self, num_words: int) -> list[str]:
        """Return the first so many words."""
        while len(self._words) < num_words:
            words, starts = next(self._paragraphs)
            self._starts += [len(self._words) + start for start in starts]
            self._words += words
        return self._words[:num_words]

    def sentence_starts(self, num_words: int) -> list[int]:
        """Return where the sentences of the first so many words begin."""
        self.words(num_words)
        return [start for start in self._starts if start < num_words]

    def with_hidden(self, num_words: int, places: Sequence[int], hidden: Sequence[str]) -> str:
        """Return the first so many words with sentences hidden in them.

        Args:
            num_words: of the text.
            places: the sentence in front of which each is, in order; the number of sentences is the end.
            hidden: the sentences.
        """
        words, starts = self.words(num_words), [*self.sentence_starts(num_words), num_words]
        parts, done = [], 0
        for place, sentence in zip(places, hidden, strict=True):
            parts += [" ".join(words[done : starts[place]]), sentence]
            done = starts[place]
        parts.append(" ".join(words[done:]))
        return " ".join(filter(None, parts))


def sentence_starts(words: Sequence[str]) -> list[int]:
    """Return where sentences begin: after a word that ends with ".", "!" or "?", unless a small letter follows.

    The published code of RULER has nltk's punkt find them; this is a rule of thumb, which needs no download.
    """
    ends = (
        number + 1
        for number, word in enumerate(words[:-1])
        if SENTENCE_END.search(word) and word not in ABBREVIATIONS and not words[number + 1][0].islower()
    )
    return [0, *ends] if words else []
