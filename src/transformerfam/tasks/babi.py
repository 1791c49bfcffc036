"""bAbI's stories of people, places and things: a simulator of its published grammar, which also knows the answers.

Five tasks: where somebody is (qa1), where a thing is (qa2), where it was before (qa3), how two places lie (qa4), and
who gave what to whom (qa5).

Source: Weston et al., 2015, Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PEOPLE = ("Mary", "John", "Sandra", "Daniel")
GIVERS = ("Mary", "Fred", "Bill", "Jeff")
PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")
THINGS = ("apple", "football", "milk")
MOVE = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKE = ("got", "took", "grabbed", "picked up")
DROP = ("dropped", "put down", "left", "discarded")
GIVE = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
NUM_SENTENCES = {"qa1": (2, 10), "qa2": (4, 68), "qa3": (6, 32), "qa4": (2, 2), "qa5": (2, 126)}
"""The fewest and the most sentences of a story, about those of bAbI."""
CHANCE_OF_THERE = 0.5
"""Of " there" after taking or dropping something."""


@dataclass(frozen=True)
class BabiStory:
    """A story and a question on it.

    Attributes:
        sentences: in order.
        question: what is asked.
        answer: one word.
        supports: indices of the sentences from which it follows.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]


Asked = tuple[str, str, tuple[int, ...]]
"""A question, its answer, and the sentences from which that follows."""


@dataclass
class _World:
    """Who is where and holds what, and which sentences said so."""

    draw: random.Random
    people: tuple[str, ...]
    sentences: list[str] = field(default_factory=list)
    place_of: dict[str, tuple[str, int]] = field(default_factory=dict)  # of people
    holder_of: dict[str, tuple[str, int]] = field(default_factory=dict)
    visits: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)  # of things, as far as known
    gifts: list[tuple[str, str, str, int]] = field(default_factory=list)  # giver, thing, receiver, sentence

    def write(self, sentence: str) -> int:
        """Write a sentence and return its number."""
        self.sentences.append(f"{sentence}.")
        return len(self.sentences) - 1

    def step(self, with_gifts: bool) -> None:
        """Let something happen that can happen."""
        person, chance = self.draw.choice(self.people), self.draw.random()
        held = [thing for thing, (holder, _) in self.holder_of.items() if holder == person]
        free = [thing for thing in THINGS if self._can_be_taken(thing, person)]
        there = " there" if self.draw.random() < CHANCE_OF_THERE else ""
        if with_gifts and held and chance < 0.5:
            self._give(person, self.draw.choice(held))
        elif free and chance < 0.4:
            self._take(person, self.draw.choice(free), there)
        elif held and chance < 0.55:
            self._drop(person, self.draw.choice(held), there)
        else:
            self.move(person)

    def _can_be_taken(self, thing: str, person: str) -> bool:
        """Say whether a thing may be where a person is: nobody holds it, and nothing says that it is elsewhere."""
        here, visits = self.place_of.get(person), self.visits.get(thing)
        return thing not in self.holder_of and here is not None and (not visits or visits[-1][0] == here[0])

    def move(self, person: str) -> None:
        """Let somebody walk, with all that they hold."""
        here = self.place_of.get(person, ("", 0))[0]
        place = self.draw.choice([place for place in PLACES if place != here])
        number = self.write(f"{person} {self.draw.choice(MOVE)} the {place}")
        self.place_of[person] = (place, number)
        for thing, (holder, taken) in self.holder_of.items():
            if holder == person:
                self.visits.setdefault(thing, []).append((place, (taken, number)))

    def _take(self, person: str, thing: str, there: str) -> None:
        number = self.write(f"{person} {self.draw.choice(TAKE)} the {thing}{there}")
        self.holder_of[thing] = (person, number)
        place, moved = self.place_of[person]
        visits = self.visits.setdefault(thing, [])
        if not visits or visits[-1][0] != place:
            visits.append((place, (moved, number)))

    def _drop(self, person: str, thing: str, there: str) -> None:
        self.write(f"{person} {self.draw.choice(DROP)} the {thing}{there}")
        del self.holder_of[thing]

    def _give(self, person: str, thing: str) -> None:
        """Let somebody give a thing to another who is, or may be, in the same place."""
        here = self.place_of[person]
        others = [name for name in self.people if name != person]
        near = [name for name in others if self.place_of.get(name, here)[0] == here[0]]
        if not near:
            self.move(person)
            return
        other = self.draw.choice(near)
        number = self.write(f"{person} {self.draw.choice(GIVE)} the {thing} to {other}")
        self.holder_of[thing] = (other, number)
        self.place_of.setdefault(other, here)
        self.gifts.append((person, thing, other, number))

    def where_people_are(self) -> Iterator[Asked]:
        """Yield the questions of qa1."""
        for person, (place, number) in self.place_of.items():
            yield f"Where is {person}?", place, (number,)

    def where_things_are(self) -> Iterator[Asked]:
        """Yield the questions of qa2."""
        for thing, visits in self.visits.items():
            yield f"Where is the {thing}?", visits[-1][0], tuple(sorted(visits[-1][1]))

    def where_things_were(self) -> Iterator[Asked]:
        """Yield the questions of qa3, on a place that the thing was in once."""
        for thing, visits in self.visits.items():
            places = [place for place, _ in visits]
            for number in range(1, len(visits)):
                supports = tuple(sorted({*visits[number - 1][1], *visits[number][1]}))
                if places.count(places[number]) == 1 and len(supports) == 3:
                    yield f"Where was the {thing} before the {places[number]}?", places[number - 1], supports

    def who_gave_what(self) -> Iterator[Asked]:
        """Yield the questions of qa5 that have one answer, however often something was given."""
        for gift in self.gifts:
            giver, thing, receiver, _ = gift
            asked = {
                f"What did {giver} give to {receiver}?": (1, (0, 2)),
                f"Who gave the {thing} to {receiver}?": (0, (1, 2)),
                f"Who did {giver} give the {thing} to?": (2, (0, 1)),
                f"Who gave the {thing}?": (0, (1,)),
                f"Who received the {thing}?": (2, (1,)),
            }
            for question, (wanted, given) in asked.items():
                fitting = [other for other in self.gifts if all(other[part] == gift[part] for part in given)]
                if fitting[-1] == gift and len({str(other[wanted]) for other in fitting}) == 1:
                    yield question, str(gift[wanted]), (gift[3],)


QUESTIONS: dict[str, Callable[[_World], Iterator[Asked]]] = {
    "qa1": _World.where_people_are,
    "qa2": _World.where_things_are,
    "qa3": _World.where_things_were,
    "qa5": _World.who_gave_what,
}


def draw_babi(name: str, draw: random.Random, num_sentences: int) -> BabiStory | None:
    """Draw a story and a question on it.

    Args:
        name: of a task, "qa1" to "qa5".
        draw: source of chance.
        num_sentences: of the story; qa4 has two.

    Returns:
        The story; None where so many sentences have no such question.
    """
    if name == "qa4":
        return _draw_map(draw)
    world = _World(draw, GIVERS if name == "qa5" else PEOPLE)
    while len(world.sentences) < num_sentences:
        if name == "qa1":
            world.move(draw.choice(world.people))
        else:
            world.step(with_gifts=name == "qa5")
    asked = list(QUESTIONS[name](world))
    if not asked:
        return None
    question, answer, supports = draw.choice(asked)
    return BabiStory(tuple(world.sentences), question, answer, supports)


def _draw_map(draw: random.Random) -> BabiStory:
    """Draw two sentences that say how three places lie, and a question on the one that both name.

    A question turns a sentence round half of the time: if the garden is west of the office, the office is east of it.
    """
    middle, *others = draw.sample(PLACES, 3)
    sides = draw.sample(sorted(OPPOSITE), 2)  # of the middle
    sentences = tuple(
        f"The {other} is {side} of the {middle}."
        if draw.random() < 0.5
        else f"The {middle} is {OPPOSITE[side]} of the {other}."
        for other, side in zip(others, sides, strict=True)
    )
    support = draw.randrange(2)
    side = sides[support]
    asked = (f"What is {side} of the {middle}?", f"What is the {middle} {OPPOSITE[side]} of?")
    return BabiStory(sentences, draw.choice(asked), others[support], (support,))
