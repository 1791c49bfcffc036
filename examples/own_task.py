"""Write a task as plain files: where is a thing, asked long after it was said.

python examples/own_task.py FOLDER [--items N] [--sentences N]

Writes train.jsonl (prompt and answer, for a recipe's [instructions]), words.txt (what the tiny model's vocabulary is
made of) and questions.jsonl (for `fam evaluate answers`). Train on it with recipes/own_task.toml.
"""

import argparse
import json
import random
from pathlib import Path

THINGS = ("lamp", "book", "coat", "drum", "kite", "ring", "rope", "vase")
PLACES = ("attic", "barn", "cellar", "garden", "hall", "kitchen", "office", "tower")
FILLER = (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.")


def draw_item(draw: random.Random, sentences: int) -> tuple[str, str, str]:
    """Return a text with one fact and up to so many sentences after it, the question, and the answer."""
    thing, place = draw.choice(THINGS), draw.choice(PLACES)
    start = draw.randrange(len(FILLER))
    filler = "".join(FILLER[(start + i) % len(FILLER)] for i in range(draw.randint(1, sentences)))
    return f" The {thing} is in the {place}.{filler}", f" Where is the {thing}?", place


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description="Write a task as plain files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--sentences", type=int, default=24)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    with (given.folder / "train.jsonl").open("w") as file:
        for _ in range(given.items):
            text, question, answer = draw_item(draw, given.sentences)
            file.write(json.dumps({"prompt": text + question, "answer": f" {answer}."}) + "\n")
    with (given.folder / "questions.jsonl").open("w") as file:
        for sentences in (10, 100, 1000):
            for _ in range(20):
                text, question, answer = draw_item(draw, 1)
                text += "".join(FILLER[i % len(FILLER)] for i in range(sentences))
                item = {"text": text, "question": question, "answers": [answer], "group": f"{sentences} sentences"}
                file.write(json.dumps(item) + "\n")
    (given.folder / "words.txt").write_text(" ".join([*THINGS, *PLACES, "The is in the Where"]))


if __name__ == "__main__":
    main()
