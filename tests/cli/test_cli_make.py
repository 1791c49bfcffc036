"""`fam data make`: files that `fam evaluate answers` takes, never in the place of another, refused before the work."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from ruler_parts import write_parts

from transformerfam.cli import make
from transformerfam.errors import TransformerFamError
from transformerfam.reports.rows import read_rows
from transformerfam.tasks import answers_evaluation
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import AnswersEvaluation
from transformerfam.tasks.made_questions import Lengths
from transformerfam.weights.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("data"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_made_questions_are_asked_and_scored(folder: Path, parts: Path, tmp_path: Path) -> None:
    """Catches a file that the evaluation does not take, a row without its score, and a table that lacks it."""
    path, rows = tmp_path / "q.jsonl", tmp_path / "rows.jsonl"
    command = ("data", "make", "ruler", "--model", folder, "--folder", parts, "--output", path, "--num-items", 1)
    text = run(*command, "--task", "niah_single_2,vt", "--tokens", "800,2000")
    assert "ruler niah_single_2, 800 tokens: 1 written" in text
    assert "ruler vt, 2,000 tokens: 1 written" in text
    assert "% of the text of vt's tokens are words that the tokenizer does not know" in text
    asked = ("evaluate", "answers", path, "--model", folder, "--output", rows, "--allow-unknown")
    text = run(*asked, "--system", "fam", "--set", "block_size=256")
    assert all(name in text for name in ("niah_single_2, 800 tokens", "vt, 2,000 tokens", "score", "0.00 [0.00, 0.00]"))
    found = read_rows([rows])
    assert len(found) == 2 * 2
    assert {row["scorer"] for row in found} == {"all"}
    assert all(0 <= row["score"] <= 1 for row in found)
    assert all(1900 < row["context_tokens"] + 30 < 2000 for row in found if row["group"] == "vt, 2,000 tokens")
    assert all((row["depth"] is None) == row["group"].startswith("vt") for row in found)


@pytest.mark.filterwarnings("ignore:.*words that the tokenizer does not know")
def test_right_answers_score_one_and_wrong_ones_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rule that no answer meets, or every answer."""
    path = tmp_path / "q.jsonl"
    run("data", "make", "babilong", "--model", folder, "--tokens", 2000, "--num-items", 1, "--output", path)
    model, tokenizer = load_model(folder, config_overrides={"block_size": 256})
    evaluation = AnswersEvaluation(questions=QuestionFile(path), allow_unknown=True, batch_size=1)
    answers = {line["id"]: line["answers"][0] for line in lines(path)}
    assert {name.split()[0] for name in answers} == {"qa1", "qa2", "qa3", "qa4", "qa5"}
    for prefix, score in (("It is the ", 1.0), ("None.", 0.0)):
        said = iter([prefix + answer.upper() if score else prefix for answer in answers.values()])
        with monkeypatch.context() as patch:
            patch.setattr(answers_evaluation, "encode_start", lambda *_: [1])
            patch.setattr(answers_evaluation, "encode_rest", lambda *_: [1])
            patch.setattr(type(tokenizer), "decode", lambda *_, **__: next(said))  # noqa: B023
            assert [row["score"] for row in evaluation.rows(model, tokenizer)] == [score] * len(answers)


def test_same_seed_writes_the_same_file_and_no_file_is_replaced(folder: Path, tmp_path: Path) -> None:
    """Catches questions that differ from run to run, and a file of somebody else that is lost."""
    command = ("data", "make", "babilong", "--task", "qa1", "--model", folder, "--tokens", 2000, "--num-items", 3)
    run(*command, "--output", tmp_path / "a")
    run(*command, "--output", tmp_path / "b")
    run(*command, "--output", tmp_path / "c", "--seed", 1)
    contents = [(tmp_path / name).read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]
    assert "a is there already, and no file is replaced; choose another name" in run(
        *command, "--output", tmp_path / "a", "--seed", 1, status=2
    )
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link is there already" in run(*command, "--output", tmp_path / "link", status=2)
    assert (tmp_path / "a").read_bytes() == contents[0]
    lengths = Lengths(load_tokenizer(folder))
    assert {line["group"] for line in lines(tmp_path / "a")} == {"qa1, 2,000 tokens"}
    assert all(lengths.of(make.MadeQuestion(**line)) <= 2000 for line in lines(tmp_path / "a"))


def test_nothing_is_left_of_a_run_that_stops(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a file that is taken for a whole one."""
    command = ("data", "make", "babilong", "--task", "qa1", "--model", folder, "--tokens", 2000, "--num-items", 2)
    whole = make.make_questions
    for error, status in ((KeyboardInterrupt(), 130), (TransformerFamError("no more"), 2)):

        def broken(*arguments: Any, error: BaseException = error) -> Any:
            yield next(whole(*arguments))
            raise error

        monkeypatch.setattr(make, "make_questions", broken)
        text = run(*command, "--output", tmp_path / "a", status=status)
        assert ("interrupted; " in text) == (status == 130)
        assert not list(tmp_path.iterdir())


def test_longbench_is_taken_from_its_files(tmp_path: Path) -> None:
    """Catches files that are missed, or more questions than were asked for."""
    line = {"input": "Who?", "context": "Ann.", "answers": ["Ann"], "_id": "a"}
    for name in ("qasper", "samsum"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line | {"_id": str(n)}) + "\n" for n in range(3)))
    run("data", "make", "longbench", "--from", tmp_path, "--output", tmp_path / "all")
    assert [one["id"] for one in lines(tmp_path / "all")] == [
        f"{n} {i}" for n in ("qasper", "samsum") for i in range(3)
    ]
    few = ("data", "make", "longbench", "--from", tmp_path, "--task", "samsum", "--num-items", 1)
    assert "longbench samsum: 1 written" in run(*few, "--output", tmp_path / "few")
    assert len(QuestionFile(tmp_path / "few")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ruller", "--tokens", "99"), "there is no benchmark 'ruller'; did you mean ruler?"),
        (("ruler", "--task", "niah_singl_1", "--tokens", "99"), "no task 'niah_singl_1'; did you mean niah_single_1?"),
        (("babilong", "--task", "", "--tokens", "99"), "there is no task ''; take one of qa1, qa2"),
        (("babilong",), "babilong is made in lengths, required is --tokens, for example 4096,32768"),
        (("babilong", "--tokens", "1e3"), "--tokens has '1e3', required are whole numbers"),
        (("babilong", "--tokens", "50"), "qa1: a text of 50 tokens is too short, required are about"),
        (("babilong", "--tokens", "50", "--from", "x"), "--from has published files, and babilong is made"),
        (("longbench", "--from", "x", "--tokens", "5"), "leave --tokens out, and give --from FOLDER"),
        (("longbench",), "leave --tokens out, and give --from FOLDER"),
        (("longbench", "--from", "nowhere"), "nowhere/narrativeqa.jsonl is not there"),
        (("longbench", "--from", "nowhere", "--task", "trec"), "trec is scored by classes that an answer names"),
        (("babilong", "--tokens", "999", "--model", "timy"), "there is no model 'timy'; did you mean tiny?"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_right(
    tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a name that is guessed at, and an empty file."""
    monkeypatch.chdir(tmp_path)
    assert message in run("data", "make", *arguments, "--output", "q.jsonl", status=2)
    assert not list(tmp_path.iterdir())


def test_tokenizer_is_loaded_without_weights_or_code(folder: Path, tmp_path: Path) -> None:
    """Catches a command that waits for gigabytes of weights, and one that runs what a folder brings."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_tokenizer(tmp_path)("The sky").input_ids == load_model(folder)[1]("The sky").input_ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    with pytest.raises(TransformerFamError, match="no code of a folder is run|needs its own code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
