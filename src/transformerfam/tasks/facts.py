"""Facts with one, two or three supports, drawn from a small simulated world, to be hidden in long texts.

People walk between places, take things and put them down. A question has one answer, a place, and follows from so many
sentences: where somebody is (one), where a thing is (two: who has it, and where they went), where a thing was before it
was somewhere (three). These sentences are known, and so is their distance to the question.

Source: the tasks 1 to 3 of bAbI (Weston et al., 2015), hidden in books as in BABILong (Kuratov et al., 2024); the
simulator is this package's own.
"""

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.filler import FillerStream, load_filler
from transformerfam.tasks.text import encode, start_ids

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("apple", "football", "milk")
MAX_TRIES = 1000
MOST_SUPPORTS = 3


@dataclass(frozen=True)
class Story:
    """A story, a question on it, and its answer.

    Attributes:
        sentences: in order, each with a space in front.
        question: up to the place where the answer has to follow.
        answer: one word with a space in front.
        supports: indices of the sentences from which the answer follows, in order.
        further: all other questions of as many supports or fewer, each with its answer.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]
    further: tuple[tuple[str, str], ...] = ()


@dataclass
class _World:
    """Where everybody and everything is, and which sentence says so."""

    places: dict[str, str] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)  # of people: the sentence of their place
    holders: dict[str, str] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)  # of things: the sentence in which they were last taken
    past: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)  # of things: places, and why
    sentences: list[str] = field(default_factory=list)

    def tell(self, sentence: str) -> int:
        """Write a sentence and return its number."""
        self.sentences.append(sentence)
        return len(self.sentences) - 1

    def move(self, person: str, place: str) -> None:
        """Let somebody walk, with all that they hold."""
        number = self.tell(f" {person} went to the {place}.")
        self.places[person], self.said[person] = place, number
        for thing in [thing for thing, holder in self.holders.items() if holder == person]:
            self.past.setdefault(thing, []).append((place, (self.taken[thing], number)))

    def take(self, person: str, thing: str) -> None:
        """Let somebody take a thing where they are."""
        number = self.tell(f" {person} took the {thing}.")
        self.holders[thing], self.taken[thing] = person, number
        self.past.setdefault(thing, []).append((self.places[person], (number, self.said[person])))

    def put(self, person: str, thing: str) -> None:
        """Let somebody put a thing down; it stays where they are."""
        self.tell(f" {person} left the {thing}.")
        del self.holders[thing]

    def step(self, draw: random.Random) -> None:
        """Let something happen that can happen."""
        person = draw.choice(PEOPLE)
        here = self.places.get(person)
        held = [thing for thing in THINGS if self.holders.get(thing) == person]
        free = [
            thing
            for thing in THINGS
            if thing not in self.holders and here is not None and self._place_of(thing) in (None, here)
        ]
        chance = draw.random()
        if free and chance < 0.35:
            self.take(person, draw.choice(free))
        elif held and chance < 0.45:
            self.put(person, draw.choice(held))
        else:
            self.move(person, draw.choice([place for place in PLACES if place != here]))

    def _place_of(self, thing: str) -> str | None:
        return self.past[thing][-1][0] if thing in self.past else None

    def questions(self, num_supports: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return all questions with so many supports, each with answer and supports."""
        if num_supports == 1:
            return [
                (f" Where is {person}? {person} is in the", f" {place}", (self.said[person],))
                for person, place in self.places.items()
            ]
        if num_supports == 2:
            return [
                (f" Where is the {thing}? The {thing} is in the", f" {past[-1][0]}", tuple(sorted(past[-1][1])))
                for thing, past in self.past.items()
            ]
        found: list[tuple[str, str, tuple[int, ...]]] = []
        for thing, past in self.past.items():
            visited = [entry for i, entry in enumerate(past) if i == 0 or entry[0] != past[i - 1][0]]
            places = [place for place, _ in visited]
            for (before, why), (now, reason) in itertools.pairwise(visited):
                supports = tuple(sorted({*why, *reason}))
                if places.count(now) == 1 and len(supports) == 3:
                    question = f" Where was the {thing} before the {now}? The {thing} was in the"
                    found.append((question, f" {before}", supports))
        return found


def draw_story(draw: random.Random, num_supports: int, num_sentences: int) -> Story:
    """Draw a story and a question on it.

    Args:
        draw: source of chance.
        num_supports: sentences from which the answer follows: 1, 2 or 3.
        num_sentences: of the story.

    Raises:
        TransformerFamError: a number is out of its range, or so short a story has no such question.
    """
    if not 1 <= num_supports <= MOST_SUPPORTS or num_sentences < num_supports:
        raise TransformerFamError(
            f"num_supports is {num_supports} and num_sentences {num_sentences}, required is 1 to 3, and no fewer "
            "sentences than supports"
        )
    for _ in range(MAX_TRIES):
        world = _World()
        while len(world.sentences) < num_sentences:
            world.step(draw)
        questions = world.questions(num_supports)
        if questions:
            question, answer, supports = draw.choice(questions)
            known = [asked[:2] for number in range(1, num_supports + 1) for asked in world.questions(number)]
            further = tuple(asked for asked in known if asked[0] != question)
            return Story(tuple(world.sentences), question, answer, supports, further)
    raise TransformerFamError(
        f"in {num_sentences} sentences there is hardly ever a question with {num_supports} supports; take more"
    )


@dataclass(frozen=True)
class HiddenStory:
    """A story in a long text.

    Attributes:
        ids_T: the text, up to the last filler after the story.
        question_ids: what follows it.
        answer_ids: what has to follow then.
        support_distances: of every support, tokens from its end to the question.
        num_told_tokens: tokens up to the end of the last sentence.
    """

    ids_T: torch.Tensor
    question_ids: list[int]
    answer_ids: list[int]
    support_distances: tuple[int, ...]
    num_told_tokens: int


class FactsText:
    """Hide stories in filler, for one tokenizer."""

    def __init__(self, tokenizer: Any, filler: str | Path | FillerStream = "sentences") -> None:
        """Tokenise the filler.

        Args:
            tokenizer: a Hugging Face tokenizer.
            filler: as for `PasskeyText`.

        Raises:
            TransformerFamError: the tokenizer does not know the stories' words, or the file cannot be read.
        """
        self._tokenizer = tokenizer
        self.start_ids = start_ids(tokenizer)
        self.filler = filler if isinstance(filler, FillerStream) else load_filler(tokenizer, filler)
        unknown_id = getattr(tokenizer, "unk_token_id", None)
        for word in words():
            if unknown_id is not None and unknown_id in encode(tokenizer, f" {word}"):
                raise TransformerFamError(
                    f"the tokenizer does not know {word!r}, required are all words of the stories; use a model that "
                    'was trained with data.task = "facts"'
                )

    def decode(self, ids: list[int]) -> str:
        """Return a model's answer as text, without surrounding space."""
        return str(self._tokenizer.decode(ids)).strip()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a piece of text."""
        return encode(self._tokenizer, text)

    def hide(self, story: Story, num_filler: int, draw: random.Random) -> HiddenStory:
        """Write a story into filler, its sentences at places drawn evenly.

        Args:
            story: its sentences.
            num_filler: tokens of filler, in front of, between and after the sentences.
            draw: source of the places, and of where the filler begins.
        """
        start = draw.randrange(1 << 30)
        places = sorted(draw.randint(0, num_filler) for _ in story.sentences)
        parts, ends, done = [], [], 0
        length = 0
        for place, sentence in zip(places, story.sentences, strict=True):
            ids = torch.tensor(encode(self._tokenizer, sentence))
            parts += [self.filler.slice(start + done, place - done), ids]
            length += place - done + len(ids)
            ends.append(length)
            done = place
        parts.append(self.filler.slice(start + done, num_filler - done))
        ids_T = torch.cat(parts)
        return HiddenStory(
            ids_T,
            encode(self._tokenizer, story.question),
            encode(self._tokenizer, story.answer),
            tuple(len(ids_T) - ends[support] for support in story.supports),
            ends[-1],
        )


def words() -> tuple[str, ...]:
    """Return all words of stories and questions, for a vocabulary."""
    verbs = ("went", "to", "the", "took", "left", "Where", "is", "was", "in", "The", "before")
    return (*PEOPLE, *PLACES, *THINGS, *verbs)
