"""RULER's tasks of tracing and counting: chains of variables, common words, and frequent coded words."""

import math
import random
from collections.abc import Sequence

from transformerfam.tasks.filler import FILLER_SENTENCES
from transformerfam.tasks.made_questions import MadeQuestion, Write
from transformerfam.tasks.ruler.parts import Parts, letters

NOISE = FILLER_SENTENCES.strip() + "\n"
NUM_HOPS = 4
EXAMPLE_NOISE = 10
"""Lines of noise in the example of variable tracking: as many as the published code takes for 500 tokens of most
tokenizers."""
VT_TEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}"
VT_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
VT_ANSWER = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assgined the "
    "value {value}, they are: "
)
CWE_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}"
)
CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
CWE_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10
SHORT = 4096
"""Tokens below which words are repeated less."""
FWE_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}"
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
FWE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_LENGTH = 6
LEAST_CODED = 100
"""Words of a coded text from which on the fourth is more frequent than the fifth."""


def chain_of(names: Sequence[str], value: str) -> list[str]:
    """Return assignments, of a value to the first variable and of each to the next."""
    pairs = zip(names[1:], names, strict=False)
    return [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {before} " for name, before in pairs)]


def track(chain: Sequence[str], num_noise: int, places: Sequence[int]) -> str:
    """Return a text with the assignments of a chain in front of so many lines of noise, at sorted places."""
    sentences = [NOISE] * num_noise
    for number, (place, statement) in enumerate(zip(places, chain, strict=True)):
        sentences.insert(place + number, statement)
    return " ".join(sentences).replace(". \n", ".\n")


def prepare_vt(num_tokens: int, place: tuple[int, int], draw: random.Random) -> tuple[Write, int, int | None]:
    """Draw a chain of variables, and an example; arguments and results are those of `Prepare`."""

    def value() -> str:
        return str(draw.randrange(10_000, 99_999))

    shown, asked = value(), value()
    example_names, names = (letters(NUM_HOPS + 1, length, draw, upper=True) for length in (3, 5))
    places = sorted(draw.sample(range(EXAMPLE_NOISE), NUM_HOPS + 1))
    example = VT_TEXT.format(context=track(chain_of(example_names, shown), EXAMPLE_NOISE, places))
    example += VT_QUESTION.format(value=shown) + VT_ANSWER.format(number=NUM_HOPS + 1, value=shown)
    example += " " + " ".join(example_names) + "\n\n\n\n"
    seed, question = draw.random(), VT_QUESTION.format(value=asked)

    def write(size: int) -> MadeQuestion:
        places = sorted(random.Random(f"{seed}/{size}").sample(range(size), NUM_HOPS + 1))
        return MadeQuestion(
            text=example + VT_TEXT.format(context=track(chain_of(names, asked), size, places)),
            prompt=question + VT_ANSWER.format(number=NUM_HOPS + 1, value=asked).rstrip(),
            question=question.removeprefix("\nQuestion: "),
            answers=names,
            scorer="all",
            max_new_tokens=30,
        )

    return write, NUM_HOPS + 2, None


def numbered(words: Sequence[str]) -> str:
    """Return words with their numbers in front."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def word_list(words: Sequence[str], common: int, uncommon: int, draw: random.Random) -> str:
    """Return the first ten words so often, and the others so often, in an order that is drawn."""
    repeated = list(words[:NUM_COMMON]) * common + list(words[NUM_COMMON:]) * uncommon
    draw.shuffle(repeated)
    return numbered(repeated)


def prepare_cwe(
    parts: Parts, num_tokens: int, place: tuple[int, int], draw: random.Random
) -> tuple[Write, int, int | None]:
    """Draw words, ten of which are common, and an example; the rest is as for `Prepare`."""
    known = sorted({word for kind in parts.words.values() for word in kind})
    (shown, *of_example), often = ((20, 3, 1), (6, 1)) if num_tokens < SHORT else ((40, 10, 3), (30, 3))
    example_words, words = draw.sample(known, shown), draw.sample(known, len(known))
    example = CWE_TEXT.format(context=word_list(example_words, of_example[0], of_example[1], draw)) + CWE_QUESTION
    example += CWE_ANSWER + numbered(example_words[:NUM_COMMON]) + "\n"
    seed = draw.random()

    def write(size: int) -> MadeQuestion:
        listed = word_list(words[:size], *often, random.Random(f"{seed}/{size}"))
        return MadeQuestion(
            text=example + CWE_TEXT.format(context=listed),
            prompt=CWE_QUESTION + CWE_ANSWER,
            question=CWE_QUESTION.removeprefix("\nQuestion: "),
            answers=words[:NUM_COMMON],
            scorer="all",
            max_new_tokens=120,
        )

    return write, NUM_COMMON + 1, len(words)


def prepare_fwe(num_tokens: int, place: tuple[int, int], draw: random.Random) -> tuple[Write, int, int | None]:
    """Draw coded words, whose frequencies fall with the square of their rank; the rest is as for `Prepare`.

    The most frequent is "...", which the question leaves out.
    """
    words = ["...", *letters(max(num_tokens // 50, 6) - 1, CODED_LENGTH, draw, upper=False)]
    seed = draw.random()

    def write(size: int) -> MadeQuestion:
        counts = [int(size * rank**-2.0 / (math.pi**2 / 6)) for rank in range(1, len(words) + 1)]
        coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        random.Random(f"{seed}/{size}").shuffle(coded)
        return MadeQuestion(
            text=FWE_TEXT.format(context=" ".join(coded)),
            prompt=FWE_QUESTION + FWE_ANSWER,
            question=FWE_QUESTION.removeprefix("\nQuestion: "),
            answers=words[1:4],
            scorer="all",
            max_new_tokens=50,
        )

    return write, LEAST_CODED, None
