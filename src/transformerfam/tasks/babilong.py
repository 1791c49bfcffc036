"""BABILong's qa1 to qa5: stories of bAbI hidden, sentence by sentence, in two novels that no memory was trained on.

Source: Kuratov et al., 2024, BABILong; its prompts and its rule of scoring are those of lm-eval's tasks.
"""

import importlib.resources
import math
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.files.reading import parse_toml
from transformerfam.tasks.babi import NUM_SENTENCES, BabiStory, draw_babi
from transformerfam.tasks.haystack import Haystack
from transformerfam.tasks.made_questions import MadeQuestion, MadeTask, Write
from transformerfam.tasks.novels import HELD_OUT_NOVELS, load_novel

MAX_NEW_TOKENS = 16
MAX_TRIES = 1000
PROMPT_TOKENS = 300
"""Of an instruction with its examples, about."""
TOKENS_PER_SENTENCE = 20
"""Of a text, at least: a sentence of a story has about eight, so that it is hidden in more than its own length."""


def babilong_tasks() -> dict[str, MadeTask]:
    """Return the tasks by name."""
    return {name: MadeTask(name=name, prepare=partial(_prepare, name, _novels)) for name in NUM_SENTENCES}


@cache
def _novels() -> Haystack:
    return Haystack("\n\n".join(map(load_novel, HELD_OUT_NOVELS)), "novels", is_shuffled=True)


def _prepare(
    name: str, novels: Callable[[], Haystack], num_tokens: int, place: tuple[int, int], draw: random.Random
) -> tuple[Write, int, int | None]:
    """Draw a story and where its sentences are; the rest is as for `Prepare`.

    The last support of item i of n is in the i-th of n equal parts of the novel, the sentences before and after it are
    anywhere before and after it.
    """
    story = _draw_story(name, num_tokens, draw)
    number, num_items = place
    last = (number + draw.random()) / num_items
    shares = sorted(draw.uniform(0, last) for _ in range(story.supports[-1])) + [last]
    shares += sorted(draw.uniform(last, 1) for _ in range(len(story.sentences) - len(shares)))
    haystack = novels()
    passage = haystack.passage(num_tokens, draw)

    def write(size: int) -> MadeQuestion:
        starts = passage.sentence_starts(size)
        places = [int(share * len(starts)) for share in shares]
        return MadeQuestion(
            text=instruction(name) + passage.with_hidden(size, places, story.sentences),
            prompt="\n" + story.question,
            question=story.question,
            answers=(story.answer,),
            scorer="all",
            max_new_tokens=MAX_NEW_TOKENS,
            group=haystack.note(size),
            depth=round(starts[places[story.supports[-1]]] / size, 4),
        )

    return write, 1, None


def _draw_story(name: str, num_tokens: int, draw: random.Random) -> BabiStory:
    """Draw a story that fits a text; short ones are as likely as long ones, by the logarithm of their sentences."""
    least, most = NUM_SENTENCES[name]
    most = min(most, max(least, (num_tokens - PROMPT_TOKENS) // TOKENS_PER_SENTENCE))
    for _ in range(MAX_TRIES):
        number = round(math.exp(draw.uniform(math.log(least), math.log(most))))
        story = draw_babi(name, draw, number)
        if story is not None:
            return story
    raise TransformerFamError(f"in {most} sentences there is hardly ever a question of {name}; take a longer text")


@cache
def _prompts() -> dict[str, Any]:
    resource = importlib.resources.files("transformerfam") / "data" / "babilong.toml"
    return parse_toml(resource.read_bytes())


@cache
def instruction(name: str) -> str:
    """Return what comes before the text of a task: what is to be done, and two examples."""
    prompt = _prompts()[name]
    examples = (f"{one['input']}\n{one['question']} {one['target']}\n\n" for one in prompt["examples"])
    return prompt["description"] + "".join(examples)
