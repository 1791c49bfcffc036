"""The paper's tasks from miniature files in their published forms, read, asked and scored."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import AnswersEvaluation
from transformerfam.tasks.published import PUBLISHED, published_questions
from transformerfam.weights.models import load_model

GRASS = "The grass is green. The sky is blue."
ANSWER = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": ""}
PAPER = {
    "title": "The sun",
    "abstract": "The sun is yellow.",
    "full_text": [{"section_name": "Here", "paragraphs": ["Here we go.", "There and back again."]}],
    "qas": [
        {
            "question": "What is the sun?",
            "question_id": "q1",
            "answers": [{"answer": ANSWER | {"extractive_spans": ["yellow", "The sun"]}}],
        },
        {
            "question": "Is it?",
            "question_id": "q2",
            "answers": [{"answer": ANSWER | {"yes_no": False}}, {"answer": ANSWER | {"unanswerable": True}}],
        },
        {
            "question": "Why?",
            "question_id": "q3",
            "answers": [{"answer": ANSWER | {"free_form_answer": "Here we go."}}],
        },
    ],
}
ARTICLE: dict[str, Any] = {
    "article_id": "7",
    "article": GRASS,
    "questions": [
        {"question": "What is green? ", "options": ["The sky", "The grass", "It", "Here"], "gold_label": 2},
        {"question": "What is blue?", "options": ["The sky", "The grass", "It", "Here"], "gold_label": 1},
    ],
}


def changed_quality(**changes: Any) -> str:
    return json.dumps(ARTICLE | {"questions": [ARTICLE["questions"][0] | changes]})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Write miniature files of all tasks."""
    stories = tmp_path / "tmp"
    stories.mkdir()
    (stories / "d1.content").write_text(GRASS)
    (stories / "d2.content").write_text(GRASS)
    (tmp_path / "qaps.csv").write_text(
        "document_id,set,question,answer1,answer2,question_tokenized,answer1_tokenized,answer2_tokenized\n"
        'd1,test,"What is green, then?",The grass,"the grass,\nhere",a,b,c\n'
        "d2,train,What is blue?,The sky,sky,a,b,c\n"
        "d3,test,What is lost?,It,it,a,b,c\n"
    )
    (tmp_path / "qasper-test-v0.3.json").write_text(json.dumps({"1234.5678": PAPER}))
    (tmp_path / "QuALITY.v1.0.1.htmlstripped.dev").write_text(json.dumps(ARTICLE) + "\n")
    line = {"id": "x1", "url": "u", "title": "t", "summary": "The sky is blue.", "text": GRASS}
    (tmp_path / "english_test.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


EXPECTED: dict[str, list[tuple[str, list[str]]]] = {
    "narrativeqa": [("What is green, then?", ["The grass", "the grass,\nhere"])],
    "qasper": [
        ("What is the sun?", ["yellow, The sun"]),
        ("Is it?", ["No", "Unanswerable"]),
        ("Why?", ["Here we go."]),
    ],
    "quality": [("What is green?", ["The grass"]), ("What is blue?", ["The sky"])],
    "xlsum": [("What does the text say, in a sentence?", ["The sky is blue."])],
}


@pytest.mark.filterwarnings("ignore:.*words that the tokenizer does not know:UserWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_become_questions_that_are_asked_and_scored(folder: Path, data: Path, name: str) -> None:
    """Catches answers of another annotator, splits that are trained on, and files that an evaluation refuses."""
    output = data / "questions.jsonl"
    made = CliRunner().invoke(app, ["data", "make", name, "--from", str(data), "--output", str(output)])
    assert made.exit_code == 0, made.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["question"], line["answers"]) for line in lines] == EXPECTED[name]
    assert all(line["prompt"].endswith("\nAnswer:") for line in lines)
    assert ("The sun is yellow." in lines[0]["text"]) == (name == "qasper")
    evaluation = AnswersEvaluation(questions=QuestionFile(output), allow_unknown=True)
    rows = list(evaluation.rows(*load_model(folder)))
    measure = {"narrativeqa": "score", "xlsum": "score", "qasper": "f1", "quality": "correct"}[name]
    assert all(0 <= row[measure] <= 1 for row in rows)
    assert len(rows) == len(EXPECTED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_folder_without_the_files_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Catches an empty file of questions."""
    with pytest.raises(TransformerFamError, match=f"holds no question of {name}, required are .*"):
        list(published_questions(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("narrativeqa", "qaps.csv", "document_id,question\nd1,What?\n"),
        ("qasper", "qasper-test-v0.3.json", '{"a": {"title": "t"}}'),
        ("qasper", "qasper-test-v0.3.json", "{"),
        ("quality", "QuALITY.v1.0.1.htmlstripped.dev", '{"article": "a"}\n'),
        ("quality", "QuALITY.v1.0.1.htmlstripped.dev", json.dumps({**ARTICLE, "questions": [{"question": "a"}]})),
        ("quality", "QuALITY.v1.0.1.htmlstripped.dev", changed_quality(gold_label=0)),
        ("quality", "QuALITY.v1.0.1.htmlstripped.dev", changed_quality(gold_label=5)),
        ("quality", "QuALITY.v1.0.1.htmlstripped.dev", changed_quality(options=["a", "a ", "b", "c"])),
        ("xlsum", "english_test.jsonl", '{"id": "a", "text": "b"}\n'),
        ("xlsum", "english_test.jsonl", '{"id": "a", "text": "b", "summary": " "}\n'),
    ],
)
def test_file_of_another_form_is_refused(data: Path, name: str, file: str, content: str) -> None:
    """Catches a traceback, and questions without answers."""
    (data / file).write_text(content)
    with pytest.raises(CorruptFileError, match="another form|no text or no answer"):
        list(published_questions(name, data))


def test_lines_of_one_id_and_questions_asked_twice_have_names_of_their_own(data: Path) -> None:
    """Catches a file that is made and then refused."""
    for name in ("qaps.csv", "english_test.jsonl"):
        lines = (data / name).read_text().splitlines(keepends=True)
        (data / name).write_text("".join([*lines, *lines[-1:]]).replace("d3", "d1"))
    for name in ("narrativeqa", "xlsum"):
        names = [question.id for question in published_questions(name, data)]
        assert len(names) == len(set(names)) > 1


def test_options_of_made_benchmarks_are_refused(tmp_path: Path) -> None:
    """Catches options that are not heard."""
    command = ["data", "make", "quality", "--output", str(tmp_path / "o")]

    def refused(*more: str) -> Any:
        return " ".join(CliRunner().invoke(app, [*command, *more]).output.split())

    assert "give --from FOLDER" in refused()
    assert "leave --tokens out" in refused("--from", str(tmp_path), "--tokens", "5")
    assert "quality is one; leave it out" in refused("--from", str(tmp_path), "--task", "quality")
