"""LongBench: its prompts around the texts of its files, and scores that are the published ones or refused."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.tasks.answer_scores import score_answer
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.longbench import WITHOUT_SCORER, longbench_files, longbench_questions, longbench_tasks

LINE: dict[str, Any] = {
    **{"input": "Who is {he}? ", "context": " A story of Ann.\n", "answers": ["Ann", "Paragraph 12"]},
    **{"length": 4, "dataset": "x", "language": "en", "all_classes": None, "_id": "a1"},
}

ONE = LINE | {"answers": ["Paragraph 12"]}


@pytest.fixture(scope="module")
def published() -> Path:
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    return Path(found.submodule_search_locations[0]) / "tasks" / "longbench"


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", longbench_tasks())
def test_prompts_and_lengths_are_the_published_ones(name: str, published: Path, tmp_path: Path) -> None:
    """Catches another wording, an answer of another length, and one that is cut where it is not."""
    own = yaml.safe_load((published / f"{name}.yaml").read_text().replace("!function ", ""))
    (question,) = longbench_questions(name, written(tmp_path / "x.jsonl", ONE))
    expected = own["doc_to_text"].replace("{{context}}", ONE["context"]).replace("{{question}}", ONE["input"])
    assert question.text + question.prompt == expected
    assert question.max_new_tokens == own["generation_kwargs"]["max_gen_toks"]
    assert question.first_line == (own["generation_kwargs"]["until"] == ["\n"])
    rules = {"squad": "qa_f1", "rouge": "rouge", "numbers": "(count|retrieval)"}
    assert re.fullmatch(rf"metrics.get_{rules[question.scorer]}_with_score", own["process_results"])
    assert question.answers == (["12"] if name == "passage_retrieval_en" else ["Paragraph 12"])
    assert question.question.strip()


def test_every_english_task_is_there_or_left_out_by_name(published: Path) -> None:
    """Catches a task that is forgotten."""
    others = {"multifieldqa_zh", "passage_retrieval_zh", "dureader", "vcsum", "lsht"}  # Chinese
    names = {path.stem for path in published.glob("[!_]*.yaml") if not path.stem.endswith("_e")}
    assert names == {*longbench_tasks(), *WITHOUT_SCORER, *others}


def test_numbers_are_scored_as_published(published: Path) -> None:
    """Catches a paragraph's number counted inside another's, or letters that count."""
    source = (published / "metrics.py").read_text()
    functions = re.findall(r"(def (?:count|retrieval)_score\(.*?\n    return .*?\n)", source, re.DOTALL)
    rules: dict[str, Any] = {"re": re}
    for function in functions:
        exec(function, rules)
    for said in ("Paragraph 12", "12 or 2, or 12", "112", "twelve", "The answer is Paragraph 2."):
        expected = rules["count_score"](said, "12")
        assert expected == rules["retrieval_score"](said, "Paragraph 12")
        assert score_answer(said, ["12"], "numbers")["score"] == pytest.approx(expected, abs=1e-6)


def test_questions_are_those_of_a_questions_file(tmp_path: Path) -> None:
    """Catches a line that the evaluation refuses, or takes for something else."""
    lines = [LINE | {"input": "", "_id": str(number)} for number in range(3)]
    made = list(longbench_questions("gov_report", written(tmp_path / "gov_report.jsonl", *lines)))
    path = written(tmp_path / "q.jsonl", *(question.line().strip() for question in made))
    questions = QuestionFile(path)
    (items,) = [questions.items(places) for places in questions.texts()]
    assert [item.name for item in items] == [f"gov_report {number}" for number in range(3)]
    assert {(item.prompt, item.scorer, item.first_line) for item in items} == {(made[0].prompt, "rouge", False)}
    assert items[0].whole_text() == made[0].text


def test_missing_and_left_out_files_are_named(tmp_path: Path) -> None:
    """Catches an empty file of questions, and a number that is not the published one."""
    with pytest.raises(TransformerFamError, match="narrativeqa.jsonl is not there, required is LongBench's file"):
        longbench_files(tmp_path)
    written(tmp_path / "qasper.jsonl", LINE)
    assert list(longbench_files(tmp_path)) == ["qasper"]
    with pytest.raises(TransformerFamError, match="qmsum.jsonl is not there"):
        longbench_files(tmp_path, ["qasper", "qmsum"])
    with pytest.raises(TransformerFamError, match="lcc is scored by the edit distance of code, which is not computed"):
        longbench_files(tmp_path, ["lcc"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "x.jsonl, line 2 has another form .*; required are lines"),
        ("no json", "line 2 has another form"),
        ({name: value for name, value in ONE.items() if name != "context"}, r"line 2 has another form \(KeyError"),
        (LINE | {"answers": []}, "a1 has no context or no answer"),
        (ONE | {"context": " "}, "a1 has no context or no answer"),
        (LINE | {"answers": ["twelve"]}, r"line 2 has another form \(IndexError"),
    ],
)
def test_line_of_another_form_is_refused_with_its_number(tmp_path: Path, line: Any, message: str) -> None:
    """Catches a traceback, and a line that is skipped."""
    path = written(tmp_path / "x.jsonl", ONE, line)
    with pytest.raises(CorruptFileError, match=message):
        list(longbench_questions("passage_retrieval_en", path))
