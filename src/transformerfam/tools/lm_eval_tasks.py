"""Write a file of questions as tasks of lm-evaluation-harness, so that all of its models can be asked the same."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    """Write tasks into a folder for `--include_path`: for every group of questions one, or several.

    The harness has one scorer, one length of answer and one end of it for all of a task, so that questions that differ
    in these, or have choices, are in separate tasks. Answers in a model's own words are scored as by `fam evaluate
    answers`, choices by the harness. A line holds the whole text of its question.

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
    tasks: dict[_Kind, list[tuple[int, int]]] = {}
    for places in questions.texts():
        for place, item in zip(places, questions.items(places), strict=True):
            tasks.setdefault(_kind_of(item, max_new_tokens), []).append(place)
    names: list[str] = []
    for kind, places in tasks.items():
        name = _name_of(questions.path.stem, kind, names)
        names.append(name)
        path = folder / f"{name}.jsonl"
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for place in places:
                (item,) = questions.items([place])
                file.write(json.dumps(_line_of(item, template), ensure_ascii=False) + "\n")
        values = _common(name, path) | (_of_choices() if kind.has_choices else _of_words(kind))
        write_text(folder / f"{name}.yaml", _as_yaml(values))
    write_text(folder / SCORES_FILE, SCORES)
    return names


class _Kind(NamedTuple):
    """What the questions of a task have in common: the harness has one of each for all of a task."""

    group: str
    scorer: str
    has_choices: bool
    has_several: bool
    max_new_tokens: int
    is_one_line: bool


def _kind_of(item: Item, max_new_tokens: int) -> _Kind:
    if item.choices:
        return _Kind(item.group, SQUAD, True, len(item.answers) > 1, 0, False)
    return _Kind(item.group, item.scorer, False, False, item.max_new_tokens or max_new_tokens, item.first_line)


def _name_of(stem: str, kind: _Kind, taken: Sequence[str]) -> str:
    """Return a name that no task has yet."""
    what = "choices" if kind.has_choices else "" if kind.scorer == SQUAD else kind.scorer
    name = re.sub(r"\W+", "_", "_".join(part for part in (stem, kind.group, what) if part)).strip("_").lower()
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def _line_of(item: Item, template: str) -> dict[str, Any]:
    text, prompt = item.whole_text(), item.prompt or template.replace("{question}", item.question)
    line: dict[str, Any] = {"id": item.name, "context": text + prompt if text else prompt.lstrip()}
    if item.choices:
        gold = [item.choices.index(answer) for answer in item.answers]
        return line | {"choices": list(item.choices), "gold": gold if len(gold) > 1 else gold[0]}
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


def _of_words(kind: _Kind) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answers | first if answers else ''}}",
        "process_results": SCORES_FILE,
        "generation_kwargs": {
            "do_sample": False,
            "max_gen_toks": kind.max_new_tokens,
            "until": ["\n"] if kind.is_one_line else [],
        },
        "metric_list": _metric_list(_metrics_of(kind.scorer)),
    }


def _as_yaml(values: Mapping[str, Any]) -> str:
    """Return JSON, which is YAML, but for the tag by which the harness finds a function."""
    function = f"!function {SCORES_FILE.removesuffix('.py')}.{process_results.__name__}"
    return json.dumps(values, indent=2).replace(json.dumps(SCORES_FILE), function) + "\n"
