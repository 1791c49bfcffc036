"""NarrativeQA, Qasper, QuALITY and XL-Sum from their published files on disk: the paper's tasks under their names.

PG-19 and Isabelle are texts alone: `fam evaluate documents FOLDER` predicts them.

Source: section 4.3 and table 11 of arXiv 2404.09173; the prompts are this package's.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.reading import json_lines, parse_json, read_whole, required_form
from transformerfam.tasks.made_questions import MadeQuestion
from transformerfam.tasks.text import read_text

PROMPT = "\n\nQuestion: {question}\nAnswer:"
SUMMARY = "What does the text say, in a sentence?"
UNANSWERABLE = "Unanswerable"


@dataclass(frozen=True)
class Published:
    """A task on disk.

    Attributes:
        files: what its folder holds, for messages.
        questions: yields its questions.
    """

    files: str
    questions: Callable[[Path], Iterator[MadeQuestion]]


def narrativeqa(folder: Path) -> Iterator[MadeQuestion]:
    """Yield the questions of the test split whose story is there; scored by ROUGE-L."""
    path = folder / "qaps.csv"
    if not path.exists():
        return
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline="")), start=1):
        with required_form(f"{path}, question {number} has another form", "required is that of NarrativeQA"):
            name, answers = f"{row['document_id']} {number}", [row["answer1"], row["answer2"]]
            story, is_test = folder / "tmp" / f"{row['document_id']}.content", row["set"] == "test"
        if is_test and story.exists():
            yield _question("narrativeqa", name, read_text(story), row["question"], answers, "rouge")


def qasper(folder: Path) -> Iterator[MadeQuestion]:
    """Yield the questions of `qasper-test-*.json`; scored by F1, as published, "Unanswerable" being an answer."""
    for path in _found(folder, "qasper-test-*.json"):
        with required_form(f"{path} has another form", "required is that of Qasper"):
            for name, paper in parse_json(read_whole(path)).items():
                sections = [
                    "\n".join([section["section_name"] or "", *section["paragraphs"]]) for section in paper["full_text"]
                ]
                text = "\n\n".join([paper["title"], paper["abstract"], *sections])
                for asked in paper["qas"]:
                    answers = list(dict.fromkeys(_qasper_answer(one["answer"]) for one in asked["answers"]))
                    identity = f"{name} {asked['question_id']}"
                    yield _question("qasper", identity, text, asked["question"], answers, "squad", 64)


def _qasper_answer(answer: Mapping[str, Any]) -> str:
    if answer["unanswerable"]:
        return UNANSWERABLE
    if answer["yes_no"] is not None:
        return "Yes" if answer["yes_no"] else "No"
    return ", ".join(answer["extractive_spans"]) or str(answer["free_form_answer"])


def quality(folder: Path) -> Iterator[MadeQuestion]:
    """Yield the questions of QuALITY's development split without markup, each with four choices."""
    for path in _found(folder, "QuALITY*htmlstripped.dev"):
        for number, article in json_lines(path, "required is that of QuALITY"):
            with required_form(f"{path}, line {number} has another form", "required is that of QuALITY"):
                for idx, asked in enumerate(article["questions"]):
                    choices, gold = [option.strip() for option in asked["options"]], asked["gold_label"]
                    if not 1 <= gold <= len(choices) or len(set(choices)) < len(choices):
                        raise ValueError(f"question {idx} has gold_label {gold} of the options {choices}")
                    identity = f"{article['article_id']} {number} {idx}"
                    yield MadeQuestion(
                        id=f"quality {identity}",
                        group="quality",
                        text=article["article"],
                        prompt=PROMPT.replace("{question}", asked["question"].strip()),
                        question=asked["question"].strip(),
                        choices=choices,
                        answers=[choices[gold - 1]],
                        scorer="squad",
                        max_new_tokens=1,
                    )


def xlsum(folder: Path) -> Iterator[MadeQuestion]:
    """Yield the summaries of every `LANGUAGE_test.jsonl`; scored by ROUGE-L."""
    for path in _found(folder, "*_test.jsonl"):
        language = path.name.removesuffix("_test.jsonl")
        for number, line in json_lines(path, "required is that of XL-Sum"):
            with required_form(f"{path}, line {number} has another form", "required is that of XL-Sum"):
                name, answers = f"{language} {number} {line['id']}", [line["summary"]]
                question = _question("xlsum", name, line["text"], SUMMARY, answers, "rouge", 64)
            yield question


PUBLISHED = {
    "narrativeqa": Published("qaps.csv and tmp/DOCUMENT.content of NarrativeQA", narrativeqa),
    "qasper": Published("qasper-test-v0.3.json of Qasper", qasper),
    "quality": Published("QuALITY.v1.0.1.htmlstripped.dev of QuALITY", quality),
    "xlsum": Published("english_test.jsonl and the like of XL-Sum", xlsum),
}


def published_questions(name: str, folder: Path) -> Iterator[MadeQuestion]:
    """Yield the questions of a task.

    Args:
        name: of `PUBLISHED`.
        folder: holds its published files.

    Raises:
        TransformerFamError: a file is missing or cannot be read.
        CorruptFileError: a file has another form; the message has the line.
    """
    is_empty = True
    for question in PUBLISHED[name].questions(folder):
        is_empty = False
        yield question
    if is_empty:
        raise TransformerFamError(f"{folder} holds no question of {name}, required are {PUBLISHED[name].files}")


def _question(
    task: str, name: str, text: str, question: str, answers: list[str], scorer: str, max_new_tokens: int = 32
) -> MadeQuestion:
    known = [answer for answer in answers if answer.strip()]
    if not known or not text.strip():
        raise CorruptFileError(f"{task} {name} has no text or no answer; copy its files again")
    return MadeQuestion(
        id=f"{task} {name}",
        group=task,
        text=text,
        prompt=PROMPT.replace("{question}", question.strip()),
        question=question.strip(),
        answers=known,
        scorer=scorer,
        max_new_tokens=max_new_tokens,
        first_line=True,
    )


def _found(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())
