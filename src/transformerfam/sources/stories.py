"""Stories and articles of BIG-bench, for tests alone: minute mysteries by choice, and summaries."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError
from transformerfam.sources.package import Package
from transformerfam.sources.source import Source, Written, json_lines

TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"
BIG_BENCH = Package(
    manager="pip",
    name="bigbench",
    version="1.0.0",
    file="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    num_bytes=358249635,
    licence="Apache-2.0",
    members=tuple(
        f"{TASKS}/{task}/task.json" for task in ("minute_mysteries_qa/multiplechoice", "gem/xsum", "gem/wikilingua_en")
    ),
)


def prepare(unpacked: Mapping[str, Path]) -> Written:
    """Make one file of items a task, all for tests: BIG-bench asks that nobody trains on them."""
    folder = unpacked[BIG_BENCH.name] / TASKS

    def examples(task: str) -> list[dict[str, Any]]:
        return list(json.loads((folder / task / "task.json").read_bytes())["examples"])

    return {
        "test": [
            ("minute_mysteries.jsonl", json_lines(choices(examples("minute_mysteries_qa/multiplechoice")))),
            ("xsum.jsonl", json_lines(summaries(examples("gem/xsum"), "xsum"))),
            ("wikilingua.jsonl", json_lines(summaries(examples("gem/wikilingua_en"), "wikilingua"))),
        ]
    }


def choices(examples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield stories with the people among whom to choose."""
    for idx, example in enumerate(examples):
        scores = example["target_scores"]
        right = [choice for choice, score in scores.items() if score == 1]
        if len(right) != 1:
            raise CorruptFileError(f"minute mystery {idx} has {len(right)} right answers, required is 1")
        yield {
            "id": f"minute-mystery-{idx}",
            "text": example["input"].strip(),
            "question": "Who did it?",
            "answers": right,
            "choices": list(scores),
            "group": "minute mysteries",
        }


def summaries(examples: list[dict[str, Any]], group: str) -> Iterator[dict[str, Any]]:
    """Yield articles with their summaries."""
    for idx, example in enumerate(examples):
        target = example["target"]
        yield {
            "id": f"{group}-{idx}",
            "text": example["input"].strip(),
            "question": "Summarize the text.",
            "answers": [target] if isinstance(target, str) else list(target),
            "group": group,
        }


SOURCE = Source(
    name="stories",
    about="minute mysteries, XSum and WikiLingua of BIG-bench, for tests alone",
    packages=(BIG_BENCH,),
    prepare=prepare,
)
