"""Write a file of questions as tasks of lm-evaluation-harness, so that all of its models can be asked the same."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.files.writing import make_folder, replacing, write_text
from transformerfam.tasks.answer_scores import SQUAD, score_answer
from transformerfam.tasks.answers import Item, QuestionFile
from transformerfam.tasks.answers_evaluation import TEMPLATE

SCORES_FILE = "scores.py"
SCORES = f'''"""Answers scored as `fam evaluate answers` scores them."""

from {__name__} import process_results

__all__ = ["process_results"]
'''
SQUAD_METRICS, OTHER_METRICS, CHOICE_METRICS = ("exact_match", "f1", "contains"), ("score",), ("acc", "acc_norm")


def process_results(line: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the scores of what a model said, by the names of metrics; the harness calls it.

    Args:
        line: of a task's file.
        results: what the model said, one text.
    """
    scores = score_answer(results[0].strip(), line["answers"], line["scorer"])
    return {name: float(scores[name]) for name in _metrics_of(line["scorer"])}


def write_tasks(
    questions: QuestionFile, folder: str | Path, template: str = TEMPLATE, max_new_tokens: int = 32
) -> list[str]:
    """Write a task for every group of questions, those with choices apart, into a folder for `--include_path`.

    Answers in a model's own words are scored as by `fam evaluate answers`, choices by the harness. A line holds the
    whole text of its question.

    Args:
        questions: the file.
        folder: a new or an empty one.
        template: what a question looks like that has no prompt, with `{question}` in it.
        max_new_tokens: tokens of an answer at most, of questions that have no number.

    Returns:
        The names of the tasks.

    Raises:
        TransformerFamError: there are files in the folder, it cannot be written, or a text cannot be read.
    """
    folder = Path(folder)
    make_folder(folder)
    if any(folder.iterdir()):
        raise TransformerFamError(f"{folder} is not empty, and no file is replaced; give a new folder")
    if "{question}" not in template:
        raise TransformerFamError(f"the template is {template!r}, required is {{question}} in it")
    tasks: dict[str, list[tuple[int, int]]] = {}
    for places in questions.texts():
        for place, item in zip(places, questions.items(places), strict=True):
            tasks.setdefault(_name_of(questions.path.stem, item), []).append(place)
    for name, places in tasks.items():
        path, one_line, longest = folder / f"{name}.jsonl", True, 0
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for place in places:
                (item,) = questions.items([place])
                one_line, longest = one_line and item.first_line, max(longest, item.max_new_tokens or max_new_tokens)
                file.write(json.dumps(_line_of(item, template), ensure_ascii=False) + "\n")
        kind = _of_choices() if item.choices else _of_words(item.scorer, longest, one_line)
        write_text(folder / f"{name}.yaml", _as_yaml(_common(name, path) | kind))
    write_text(folder / SCORES_FILE, SCORES)
    return list(tasks)


def _name_of(stem: str, item: Item) -> str:
    kind = "choices" if item.choices else "" if item.scorer == SQUAD else item.scorer
    return re.sub(r"\W+", "_", "_".join(part for part in (stem, item.group, kind) if part)).strip("_").lower()


def _line_of(item: Item, template: str) -> dict[str, Any]:
    text, prompt = item.whole_text(), item.prompt or template.replace("{question}", item.question)
    line: dict[str, Any] = {"id": item.name, "context": text + prompt if text else prompt.lstrip()}
    if item.choices:
        return line | {"choices": list(item.choices), "gold": item.choices.index(item.answers[0])}
    return line | {"answers": list(item.answers), "scorer": item.scorer}


def _metrics_of(scorer: str) -> tuple[str, ...]:
    return SQUAD_METRICS if scorer == SQUAD else OTHER_METRICS


def _metric_list(names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _common(name: str, file: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "metadata": {"version": 1.0},
    }


def _of_choices() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": _metric_list(CHOICE_METRICS),
    }


def _of_words(scorer: str, max_new_tokens: int, one_line: bool) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answers | first if answers else ''}}",
        "process_results": SCORES_FILE,
        "generation_kwargs": {
            "do_sample": False,
            "max_gen_toks": max_new_tokens,
            "until": ["\n"] if one_line else [],
        },
        "metric_list": _metric_list(_metrics_of(scorer)),
    }


def _as_yaml(values: Mapping[str, Any]) -> str:
    """Return JSON, which is YAML, but for the tag by which the harness finds a function."""
    function = f"!function {SCORES_FILE.removesuffix('.py')}.{process_results.__name__}"
    return json.dumps(values, indent=2).replace(json.dumps(SCORES_FILE), function) + "\n"
