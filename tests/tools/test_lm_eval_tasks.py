"""A file of questions as tasks of the harness: run by it with a converted model, and scored as at home."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import AnswersEvaluation
from transformerfam.tools.lm_eval import FamLM
from transformerfam.tools.lm_eval_tasks import process_results, write_tasks
from transformerfam.weights.models import load_model

GRASS, SUN = "The grass is green. The sky is blue.", "The sun is yellow. Here we go. There and back again."
ITEMS: list[dict[str, Any]] = [
    {"id": "a", "text": GRASS, "question": "What is green?", "answers": ["The grass"], "group": "words"},
    {"id": "b", "text": SUN, "question": "What is yellow?", "answers": ["the sun", "sun"], "group": "words"},
    {"id": "c", "text": GRASS, "question": "Is it?", "prompt": " The", "answers": ["sky", "is"], "scorer": "all"},
    {"id": "d", "text": SUN, "question": "What?", "choices": ["the sky", "the sun"], "answers": ["the sun"]},
    {"id": "f", "text": SUN, "question": "Who?", "choices": ["it", "the sun", "a"], "answers": ["it", "a"]},
    {"id": "g", "text": SUN, "question": "Is it?", "prompt": " The", "answers": ["is"], "max_new_tokens": 1},
    {"id": "e", "question": "What is the pass key?", "answers": [], "group": "words"},
]
TEMPLATE = " {question} It is"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Write questions of every kind."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


def test_harness_gives_the_answers_and_scores_of_this_package(
    folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a prompt, an end of an answer or a score that differs, and tasks that the harness cannot load."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = write_tasks(QuestionFile(questions), tmp_path / "tasks", TEMPLATE, max_new_tokens=3)
    kinds = ["questions_words", "questions_all", "questions_choices", "questions_choices_2", "questions"]
    assert names == kinds
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(FamLM(str(folder)), tasks=list(names), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    evaluation = AnswersEvaluation(questions=QuestionFile(questions), template=TEMPLATE, max_new_tokens=3)
    rows = {row["item"]: row for row in evaluation.rows(*load_model(folder))}
    said = {
        sample["doc"]["id"]: sample["resps"][0][0]
        for name in ("questions_words", "questions_all", "questions")
        for sample in found["samples"][name]
    }
    assert {item: answer.strip() for item, answer in said.items()} == {item: rows[item]["answer"] for item in "abceg"}
    results = found["results"]
    for metric in ("exact_match", "f1", "contains"):
        mean = sum(float(rows[item][metric]) for item in "abe") / 3
        assert results["questions_words"][f"{metric},none"] == pytest.approx(mean)
    assert results["questions_all"]["score,none"] == pytest.approx(rows["c"]["score"])
    assert results["questions_choices"]["acc,none"] in (0.0, 1.0)
    (sample,) = found["samples"]["questions_choices"]
    assert sample["target"] in (1, "1")
    (several,) = found["samples"]["questions_choices_2"]
    assert several["acc"] == float(rows["f"]["correct"]) or several["acc_norm"] == float(rows["f"]["correct"])


def test_scores_are_those_of_the_scorer() -> None:
    """Catches a scorer that is left behind in the file of questions."""
    line = {"answers": ["12", "34"], "scorer": "all"}
    assert process_results(line, [" It is 12."]) == {"score": 0.5}
    assert process_results({"answers": ["big dog"], "scorer": "squad"}, ["dog"])["f1"] == pytest.approx(2 / 3)


def test_questions_that_differ_in_what_a_task_has_are_in_tasks_of_their_own(tmp_path: Path) -> None:
    """Catches answers that are cut or scored by the rules of others, and names that two groups share."""
    items = [
        ITEMS[0] | {"id": "1", "group": "g one"},
        ITEMS[0] | {"id": "2", "group": "g-one"},
        ITEMS[0] | {"id": "3", "group": "g one", "max_new_tokens": 9},
        ITEMS[0] | {"id": "4", "group": "g one", "first_line": False},
        ITEMS[0] | {"id": "5", "group": "x", "scorer": "rouge"},
        ITEMS[0] | {"id": "6", "group": "x rouge"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    names = write_tasks(QuestionFile(path), tmp_path / "tasks", TEMPLATE)
    assert names == ["q_g_one", "q_g_one_2", "q_g_one_3", "q_g_one_4", "q_x_rouge", "q_x_rouge_2"]
    assert all(len((tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()) == 1 for name in names)


def test_command_writes_once_and_refuses_what_is_there(questions: Path, tmp_path: Path) -> None:
    """Catches files of somebody else that tasks take the place of."""
    command = ["data", "export", str(questions), "--output", str(tmp_path / "tasks")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (
        "--tasks questions_words,questions_all,questions_choices,questions_choices_2,questions"
        in done.output.replace("\n", " ").replace("  ", " ")
    )
    again = CliRunner().invoke(app, command)
    assert "is not empty, and no file is replaced" in again.output
    with pytest.raises(TransformerFamError, match="required is {question} in it"):
        write_tasks(QuestionFile(questions), tmp_path / "others", "What")
