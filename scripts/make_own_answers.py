"""Write short tasks with the answers that a model gives to them, in the form of `fam evaluate answers`.

A model that is trained on them with a memory keeps what it could do in a chat before. The words and sentences of the
tasks come from the novels of the package that are trained on; answers are the likeliest ones. Stopped, the same command
continues.

HF_HUB_OFFLINE=1 python scripts/make_own_answers.py runs/data/own_answers.jsonl
"""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GenerationConfig

from transformerfam.tasks.text import list_files, read_text
from transformerfam.weights.models import load_base

TASKS = (
    "What does the word {word} mean?",
    "Write a sentence with the word {word}.",
    "Name three things that have to do with {word}.",
    "What is the opposite of {word}?",
    "Explain {word} to a child in two sentences.",
    "Write a title for a story about {word} and {other}.",
    "What have {word} and {other} in common?",
    "Write this in modern English: {sentence}",
    "Write this in fewer words: {sentence}",
    "Which words of this sentence are verbs? {sentence}",
    "Is the mood of this sentence happy or sad? {sentence}",
    "What is {number} plus {second}?",
    "Count from {second} to {third}.",
    "Give me some advice on {word}.",
    "Who are you, and what can you do?",
    "Write a short poem about {word}.",
)
COMMON = 20
"""How often a text must have a word for it to be in a task."""


def tasks_of(text: str, count: int) -> list[str]:
    """Return tasks about the words and sentences of a text."""
    draw = random.Random(0)
    sentences = [s.strip() for s in re.findall(r"[A-Z][^.!?]{30,110}[.!?]", re.sub(r"\s+", " ", text))]
    words = [word for word, times in Counter(re.findall(r"\b[a-z]{5,10}\b", text)).items() if times >= COMMON]
    made = []
    for place in range(count):
        word, other = draw.sample(words, 2)
        second = draw.randrange(2, 30)
        fields = {"word": word, "other": other, "sentence": draw.choice(sentences), "number": draw.randrange(2, 500)}
        made.append(TASKS[place % len(TASKS)].format(**fields, second=second, third=second + draw.randrange(3, 9)))
    return list(dict.fromkeys(made))


@torch.no_grad()
def main(
    output: Path,
    texts: Annotated[Path, typer.Option("--texts", help="Folder of novels.")] = Path("runs/data/books/train"),
    model: Annotated[str, typer.Option("--model")] = "smollm2",
    count: Annotated[int, typer.Option("--count", min=1)] = 400,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Of an answer at most; longer ones are left out.")
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
) -> None:
    """Generate the answers, and add them to the file."""
    loaded, tokenizer = load_base(model)
    tokenizer.padding_side = "left"
    tasks = tasks_of("\n".join(read_text(path) for path in list_files(texts)[:4]), count)
    done = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    waiting = tasks[int(json.loads(done[-1])["id"]) + 1 :] if done else tasks
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with output.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), batch_size):
            asked = waiting[start : start + batch_size]
            turns = [[{"role": "user", "content": task}] for task in asked]
            rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
            ids = loaded.generate(**inputs, generation_config=config)[:, inputs.input_ids.shape[1] :]
            for task, answer in zip(asked, ids.tolist(), strict=True):
                if tokenizer.eos_token_id in answer:
                    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
                    file.write(json.dumps({"question": task, "answers": [text], "id": str(tasks.index(task))}) + "\n")
            file.flush()
            typer.echo(f"{len(tasks) - len(waiting) + start + len(asked)} of {len(tasks)} tasks", err=True)


if __name__ == "__main__":
    typer.run(main)
