"""LongBench's English questions from its published files on disk, with its prompts and lengths of answers.

Source: Bai et al., 2023, LongBench; the prompts are those of lm-eval's tasks.
"""

import importlib.resources
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.reading import json_lines, parse_toml, required_form
from transformerfam.tasks.made_questions import MadeQuestion

FORM = 'required are lines {"input": ..., "context": ..., "answers": [...], "_id": ...} of LongBench'
WITHOUT_SCORER = {
    "trec": "classes that an answer names",
    "lcc": "the edit distance of code",
    "repobench-p": "the edit distance of code",
}
"""Tasks that are left out, with what their published score compares."""


@cache
def longbench_tasks() -> dict[str, dict[str, Any]]:
    """Return the tasks by name: `text` and `prompt` around the context, and how an answer is taken and scored."""
    resource = importlib.resources.files("transformerfam") / "data" / "longbench.toml"
    return parse_toml(resource.read_bytes())


def longbench_files(folder: Path, names: list[str] | None = None) -> dict[str, Path]:
    """Return the files of tasks.

    Args:
        folder: holds NAME.jsonl.
        names: of tasks; None takes those whose file is there.

    Raises:
        TransformerFamError: a file is not there, or a task is left out.
    """
    files = {name: folder / f"{name}.jsonl" for name in names or longbench_tasks()}
    for name in names or ():
        if name in WITHOUT_SCORER:
            raise TransformerFamError(
                f"{name} is scored by {WITHOUT_SCORER[name]}, which is not computed here; take another task, or lm-eval"
            )
    found = {name: path for name, path in files.items() if path.is_file()}
    missing = [path for name, path in files.items() if name not in found]
    if (names and missing) or not found:
        raise TransformerFamError(
            f"{missing[0]} is not there, required is LongBench's file; download its data.zip, unpack it, and give the "
            "folder (--from)"
        )
    return found


def longbench_questions(name: str, path: Path) -> Iterator[MadeQuestion]:
    """Yield the questions of a file, one line at a time.

    Raises:
        CorruptFileError: a line has another form; the message has its number.
        TransformerFamError: the file cannot be read.
    """
    for number, line in json_lines(path, FORM):
        with required_form(f"{path}, line {number} has another form", FORM):
            question = _question(name, line)
        yield question


def _question(name: str, line: dict[str, Any]) -> MadeQuestion:
    task, asked = longbench_tasks()[name], str(line["input"]).strip()
    answers = [str(answer) for answer in line["answers"]]
    if name == "passage_retrieval_en":
        answers = [re.findall(r"Paragraph (\d+)", answer)[0] for answer in answers]
    if not answers or not isinstance(line["context"], str) or not line["context"].strip():
        raise CorruptFileError(f"{line['_id']} has no context or no answer; {FORM}")
    prompt = task["prompt"].replace("{input}", str(line["input"]))
    return MadeQuestion(
        id=f"{name} {line['_id']}",
        group=f"longbench {name}",
        text=task["text"] + line["context"],
        prompt=prompt,
        question=asked or prompt.strip(),
        answers=answers,
        scorer=task["scorer"],
        max_new_tokens=task["max_new_tokens"],
        first_line=task.get("first_line", False),
    )
