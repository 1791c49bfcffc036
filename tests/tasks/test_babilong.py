"""BABILong: stories that an independent reading answers alike, hidden in novels at every depth."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import yaml

from transformerfam.errors import TransformerFamError
from transformerfam.tasks import babilong
from transformerfam.tasks.babi import NUM_SENTENCES, draw_babi
from transformerfam.tasks.babilong import babilong_tasks, instruction
from transformerfam.tasks.haystack import Haystack
from transformerfam.tasks.made_questions import Lengths, MadeQuestion, make_questions
from transformerfam.tasks.novels import load_novel
from transformerfam.training.tiny import build_tiny_tokenizer

NAMES = tuple(NUM_SENTENCES)
PERSON, THING = "(Mary|John|Sandra|Daniel|Fred|Bill|Jeff)", "(apple|football|milk)"
PLACE = "(kitchen|garden|office|bathroom|hallway|bedroom)"  # and not the house that a novel's people leave
MOVED = re.compile(rf"{PERSON} (?:moved to|went to|journeyed to|travelled to|went back to) the {PLACE}\.")
TOOK = re.compile(rf"{PERSON} (?:got|took|grabbed|picked up) the {THING}(?: there)?\.")
DROPPED = re.compile(rf"{PERSON} (?:dropped|put down|left|discarded) the {THING}(?: there)?\.")
GAVE = re.compile(rf"{PERSON} (?:gave|handed|passed) the {THING} to {PERSON}\.")
LIES = re.compile(rf"The {PLACE} is (north|south|east|west) of the {PLACE}\.")
TURNED = {"north": "south", "south": "north", "east": "west", "west": "east"}


@pytest.fixture(scope="module")
def lengths() -> Lengths:
    return Lengths(build_tiny_tokenizer())


def made(lengths: Lengths, name: str, num_tokens: int, num_items: int = 4, seed: int = 0) -> list[MadeQuestion]:
    return list(make_questions(babilong_tasks()[name], lengths, num_tokens, num_items, seed))


def solved(sentences: list[str], question: str) -> set[str]:
    """Read sentences one by one and return the answers that the question has."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    trace: dict[str, list[str]] = {}
    gifts: list[tuple[str, ...]] = []
    lies: list[tuple[str, str, str]] = []

    def see(thing: str, place: str) -> None:
        if trace.setdefault(thing, [])[-1:] != [place]:
            trace[thing].append(place)

    for sentence in sentences:
        if found := MOVED.fullmatch(sentence):
            person, place = found.groups()
            where[person] = place
            for thing in [thing for thing, by in holder.items() if by == person]:
                see(thing, place)
        elif found := TOOK.fullmatch(sentence):
            person, thing = found.groups()
            assert thing not in holder
            holder[thing] = person
            see(thing, where.get(person, "unknown"))
        elif found := DROPPED.fullmatch(sentence):
            person, thing = found.groups()
            assert holder.pop(thing) == person
        elif found := GAVE.fullmatch(sentence):
            giver, thing, receiver = found.groups()
            assert holder[thing] == giver != receiver
            holder[thing] = receiver
            gifts.append(found.groups())
        else:
            found = LIES.fullmatch(sentence)
            assert found, sentence
            one, side, other = found.groups()
            lies += [(one, side, other), (other, TURNED[side], one)]
    if found := re.fullmatch(r"Where is (the )?(\w+)\?", question):
        return {trace[found[2]][-1] if found[1] else where[found[2]]}
    if found := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        places = trace[found[1]]
        assert places.count(found[2]) == 1
        return {places[places.index(found[2]) - 1]}
    if found := re.fullmatch(r"What is the (\w+) (\w+) of\?", question):
        return {other for one, side, other in lies if (one, side) == found.groups()}
    if found := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return {one for one, side, other in lies if (side, other) == found.groups()}
    patterns = {
        r"What did (?P<g>\w+) give to (?P<r>\w+)\?": 1,
        r"Who gave the (?P<t>\w+)(?: to (?P<r>\w+))?\?": 0,
        r"Who did (?P<g>\w+) give the (?P<t>\w+) to\?": 2,
        r"Who received the (?P<t>\w+)\?": 2,
    }
    for pattern, wanted in patterns.items():
        if found := re.fullmatch(pattern, question):
            known = {"gtr".index(name): value for name, value in found.groupdict().items() if value}
            return {gift[wanted] for gift in gifts if all(gift[place] == value for place, value in known.items())}
    raise AssertionError(question)


@pytest.mark.parametrize("name", NAMES)
def test_an_independent_reading_gives_the_same_answer(name: str) -> None:
    """Catches a wrong answer, a question with two, and supports from which the answer does not follow."""
    draw, questions, lengths = random.Random(0), set(), set()
    for _ in range(300):
        story = draw_babi(name, draw, draw.randint(*NUM_SENTENCES[name]))
        if story is None:
            continue
        assert solved(list(story.sentences), story.question) == {story.answer}
        assert list(story.supports) == sorted(set(story.supports))
        assert len(story.supports) == {"qa2": 2, "qa3": 3}.get(name, 1)
        supports = [story.sentences[number] for number in story.supports]
        if name not in ("qa2", "qa3"):
            assert solved(supports, story.question) == {story.answer} if name != "qa5" else story.answer in supports[0]
        else:
            assert story.answer in " ".join(supports)
        questions.add(re.sub(r"[A-Z]\w+|the \w+", "", story.question[1:]))
        lengths.add(len(story.sentences))
    assert len(questions) >= {"qa4": 4, "qa5": 4}.get(name, 1)
    assert len(lengths) > 1 or name == "qa4"


@pytest.mark.parametrize("name", NAMES)
def test_story_is_whole_and_in_order_among_the_sentences_of_a_novel(lengths: Lengths, name: str) -> None:
    """Catches a sentence that is lost or in another's place, a length that is exceeded, and items of chance."""
    novels = " ".join((load_novel("persuasion") + load_novel("northanger_abbey")).split())
    kinds = re.compile("|".join(f"(?:{kind.pattern})" for kind in (MOVED, TOOK, DROPPED, GAVE, LIES)))
    items = made(lengths, name, 2500, 3)
    for item in items:
        assert 2490 <= lengths.of(item) <= 2500
        assert item.text.startswith(instruction(name))
        text = item.text.removeprefix(instruction(name))
        sentences = [found[0] for found in kinds.finditer(text)]
        assert solved(sentences, item.prompt.strip()) == set(item.answers)
        low, high = NUM_SENTENCES[name]
        assert low <= len(sentences) <= high
        rest = " ".join(kinds.sub(" ", text).split())
        assert rest[:500] in novels
        assert rest[-500:] in novels
    assert items == made(lengths, name, 2500, 3)
    assert items[0].text != made(lengths, name, 2500, 1, seed=1)[0].text
    assert len({item.text[-200:] for item in items}) == len(items)


def test_last_supports_are_at_every_depth(lengths: Lengths) -> None:
    """Catches facts that are all near the end, or a depth in the rows that is that of another sentence."""
    items = made(lengths, "qa4", 3000, 10)
    depths = [item.depth for item in items]
    assert [int(10 * depth) for depth in depths if depth is not None] == pytest.approx(list(range(10)), abs=1)
    for item in items:
        text = item.text.removeprefix(instruction("qa4"))
        places = [found.start() / len(text) for found in LIES.finditer(text)]
        assert min(abs(place - item.depth) for place in places) < 0.02


def test_novels_that_repeat_are_said_to_and_shuffled(lengths: Lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text read twice in the same order, and rows that do not tell it from one that was not."""
    paragraphs = [" ".join(f"P{number} word{place}." for place in range(20)) for number in range(100)]
    text = "\n\n".join(paragraphs[:10])
    monkeypatch.setattr(babilong, "_novels", lambda: Haystack(text, "novels", is_shuffled=True))
    items = made(lengths, "qa1", 9000, 2)
    for item in items:
        assert item.group == "qa1, 9,000 tokens, novels repeat"
        assert 8990 < lengths.of(item) <= 9000
        order = [int(number) for number in re.findall(r"P(\d+) word0\.", item.text)]
        assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
        assert order[:10] != order[10:20]
    assert items[0].text[-500:] != items[1].text[-500:]
    text = "\n\n".join(paragraphs)
    for item in made(lengths, "qa1", 2000, 4):
        assert item.group == "qa1, 2,000 tokens"
        order = [int(number) for number in re.findall(r"P(\d+) word0\.", item.text)]
        assert order == list(range(order[0], order[-1] + 1))


@pytest.mark.parametrize("name", NAMES)
def test_instructions_and_examples_are_the_published_ones(name: str) -> None:
    """Catches a prompt whose scores cannot be compared with published ones."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    folder = Path(found.submodule_search_locations[0]) / "tasks" / "babilong"
    files = (folder / f"babilong_{name}.yaml", folder / "_babilong_common_yaml")
    own, common = (yaml.safe_load(file.read_text().replace("!function ", "")) for file in files)
    assert own["doc_to_text"] == "{{input.strip()}}\n{{question.strip()}}"
    examples = own["fewshot_config"]["samples"][: common["num_fewshot"]]
    shown = (f"{one['input']}\n{one['question']}{common['target_delimiter']}{one['target']}\n\n" for one in examples)
    assert instruction(name) == own["description"] + "".join(shown)
    (item,) = made(Lengths(build_tiny_tokenizer()), name, 2000, 1)
    assert item.max_new_tokens == common["generation_kwargs"]["max_gen_toks"]
    assert item.prompt == f"\n{item.question}"


def test_length_that_is_too_short_is_refused_with_one_that_is_not(lengths: Lengths) -> None:
    """Catches a text without its story."""
    with pytest.raises(TransformerFamError, match=r"qa2: a text of 100 tokens is too short, required are about \d+;"):
        made(lengths, "qa2", 100)
