"""RULER's needles in a haystack: magic numbers or UUIDs hidden under keys, and a question for one or several keys."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from transformerfam.tasks.filler import FILLER_SENTENCES
from transformerfam.tasks.made_questions import MadeQuestion, Write
from transformerfam.tasks.ruler.parts import Parts

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEXT = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n"
)
QUESTION = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
ANSWER = " The special magic {kind} for {query} mentioned in the provided text are"
DEPTHS = tuple(round(100 * number / 39) for number in range(40))
"""Percent of the essays' sentences that come before a needle."""
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Needles:
    """What is hidden, where, and how much of it the question wants."""

    haystack: Literal["repeat", "essay", "needle"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("repeat"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}


def prepare(
    task: Needles, parts: Parts, num_tokens: int, place: tuple[int, int], draw: random.Random
) -> tuple[Write, int, int | None]:
    """Draw needles and what is asked; the rest is as for `Prepare`."""
    known: set[str] = set()
    keys = [parts.different(task.keys, draw, known) for _ in range(task.num_keys)]
    values = [[parts.different(task.values, draw, known) for _ in range(task.num_values)] for _ in keys]
    pairs = [(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
    draw.shuffle(pairs)
    needles = [NEEDLE.format(kind=task.values, key=key, value=value) for key, value in pairs]
    asked = draw.sample(range(task.num_keys), task.num_queries)
    answers = [value for number in asked for value in values[number]]
    depths, seed = draw.sample(DEPTHS, len(needles)), draw.random()
    noise_draw, noise = random.Random(seed), list[str]()
    passage = parts.essays.passage(num_tokens, draw) if task.haystack == "essay" else None

    def write(size: int) -> MadeQuestion:
        if passage is not None:
            num_sentences = len(passage.sentence_starts(size))
            places = sorted(int(num_sentences * (depth / 100)) for depth in depths)
            context = passage.with_hidden(size, places, needles)
        else:
            while len(noise) < size:
                noise.append(_noise(task, parts, noise_draw, known))
            places = random.Random(f"{seed}/{size}").sample(range(size), len(needles))
            context = among_lines(noise[:size], needles, places)
        note = parts.essays.note(size) if passage is not None else ""
        return worded(task, context, [keys[number] for number in asked], answers, note)

    return write, len(needles), None


def _noise(task: Needles, parts: Parts, draw: random.Random, known: set[str]) -> str:
    if task.haystack == "repeat":
        return FILLER_SENTENCES.strip()
    key = parts.different(task.keys, draw, known)
    return NEEDLE.format(kind=task.values, key=key, value=parts.different(task.values, draw, known))


def among_lines(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """Return lines with needles in front of some, the first needle in front of the last of these."""
    whole = list(lines)
    for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
        whole.insert(place, needle)
    return "\n".join(whole)


def worded(task: Needles, context: str, queries: Sequence[str], answers: Sequence[str], note: str = "") -> MadeQuestion:
    """Return an item in the published words, singular where one value is wanted."""
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    text, question, answer, kind, depth = TEXT, QUESTION, ANSWER, str(task.values), None
    if len(answers) == 1:
        text = text.replace("Some", "A").replace("are", "is")
        question, answer = question.replace("are all", "is"), answer.replace("are", "is")
        kind = kind.removesuffix("s")
        needle = NEEDLE.format(kind=task.values, key=queries[0], value=answers[0])
        depth = round(context.index(needle) / len(context), 4)
    question = question.format(kind=kind, query=query)
    return MadeQuestion(
        text=text.format(kind=kind) + context,
        prompt=question + answer.format(kind=kind, query=query),
        question=question.strip(),
        answers=answers,
        scorer="all",
        max_new_tokens=MAX_NEW_TOKENS,
        group=note,
        depth=depth,
    )


def prepare_named(name: str, parts: Parts) -> partial[tuple[Write, int, int | None]]:
    """Return `prepare` of a task."""
    return partial(prepare, NEEDLES[name], parts)
