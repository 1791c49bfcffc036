"""Questions of one's own: files are checked line by line, each text is read once, every answer is scored."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.reports.answers import answers_tables, interval
from transformerfam.reports.rows import read_rows
from transformerfam.tasks.answer_scores import require_scorers, rouge_scorer, score_answer
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import (
    BM25,
    QUESTION_ALONE,
    AnswersEvaluation,
    finished_questions,
    kv_bytes_per_token,
)
from transformerfam.tasks.retrieval import retrieve
from transformerfam.weights.models import load_model

GRASS = "The grass is green. The sky is blue."
SUN = "The sun is yellow. Here we go. There and back again."
ITEMS: list[dict[str, Any]] = [
    {"id": "grass", "text": GRASS, "question": "What is green?", "answers": ["The grass"], "group": "words"},
    {"text": GRASS, "question": "What is blue?", "answers": ["The sky", "sky"]},
    {"file": "sun.txt", "question": "What is yellow?", "answers": ["the sun"], "choices": ["the sky", "the sun"]},
    {"text": SUN, "question": "What is the pass key?", "answers": []},
]
TEMPLATE = " {question} It is"
WIDER = {"block_size": 32}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write questions on three texts."""
    (tmp_path / "sun.txt").write_text(SUN)
    return written(tmp_path / "questions.jsonl", ITEMS)


def written(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def rows_of(path: Path, folder: Path, **options: Any) -> list[dict[str, Any]]:
    model, tokenizer = load_model(folder, config_overrides=WIDER)
    fields = {"template": TEMPLATE, "max_new_tokens": 3} | options
    return list(AnswersEvaluation(questions=QuestionFile(path), **fields).rows(model, tokenizer))


def said(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], str]:
    return {(row["system"], row["item"], row["filler_tokens"]): row["answer"] for row in rows}


def test_questions_on_one_text_stand_together(path: Path) -> None:
    """Catches a text that is read for every question, and a file that is looked for where the command was run."""
    questions = QuestionFile(path)
    found = [[item.name for item in questions.items(places)] for places in questions.texts()]
    assert found == [["grass", "line 2"], ["line 3", "line 4"]]  # the text of the file is that of line 4
    of_file = questions.items(questions.texts()[1])[0]
    assert of_file.whole_text() == SUN
    assert len(questions) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2: it is no JSON"),
        ("[1]", "line 2: it is list, not an object"),
        ({"question": "Q"}, r"line 2: it has no answers; \[\] says that the text does not have the answer"),
        ({"text": "\ud800", "question": "Q", "answers": []}, "line 2: text has half a surrogate pair at 0"),
        ({"text": "t", "question": "Q", "answers": [], "group": "\udfff"}, "line 2: group has half a surrogate pair"),
        ({"text": "t", "file": "f", "question": "Q", "answers": []}, "line 2: it has text and file, not one of them"),
        ({"text": " ", "question": "Q", "answers": []}, r'line 2: text is " ", not a text with a word'),
        ({"text": "t", "answers": []}, "line 2: question is null"),
        ({"text": "t", "question": "Q", "answers": "a"}, 'line 2: answers is "a", not a list'),
        ({"text": "t", "question": "Q", "answers": [1]}, "line 2: one of answers is 1"),
        ({"text": "t", "question": "Q", "answers": ["a"], "choices": ["b", "c"]}, "not among choices"),
        ({"text": "t", "question": "Q", "answers": [], "choices": ["b", "c"]}, "with an answer among them"),
        ({"text": "t", "question": "Q", "answers": ["b"], "choices": ["b", "b"]}, "two or more different ones"),
        ({"text": "t", "question": "Q", "answers": [], "grp": "x"}, "line 2: unknown key 'grp'"),
        (
            {"text": "t", "question": "Q", "answers": ["a"], "scorer": "al"},
            'scorer is "al", not one of squad, all, any',
        ),
        (
            {"text": "t", "question": "Q", "answers": ["a"], "scorer": ["all"]},
            r'line 2: scorer is \["all"\], not one of',
        ),
        ({"text": "t", "question": "Q", "answers": [], "scorer": "all"}, "line 2: scorer is 'all', which compares"),
        ({"text": "t", "question": "Q", "answers": ["a"], "max_new_tokens": 0}, "line 2: max_new_tokens is 0, not a"),
        ({"text": "t", "question": "Q", "answers": ["a"], "max_new_tokens": True}, "max_new_tokens is true, not a"),
        ({"text": "t", "question": "Q", "answers": ["a"], "depth": 1.5}, "line 2: depth is 1.5, not a number from 0"),
        ({"text": "t", "question": "Q", "answers": ["a"], "first_line": 1}, "line 2: first_line is 1, not true or"),
        ({"text": "t", "question": "Q", "answers": ["a"], "prompt": " "}, 'line 2: prompt is " ", not a text with a'),
        ({"id": "one", "text": "t", "question": "Q", "answers": []}, "line 2: its id is 'one', as in line 1"),
        ({"passages": [{"title": "t"}], "question": "Q", "answers": []}, "line 2: passages are not a list of"),
        (b'{"text": "\xff"}', "line 2: it is not UTF-8"),
    ],
)
def test_bad_line_is_named_with_what_to_write(tmp_path: Path, line: Any, message: str) -> None:
    """Catches an item that is skipped, or found wrong after hours of reading."""
    path = written(tmp_path / "q.jsonl", [{"id": "one", "text": "t", "question": "Q", "answers": []}])
    content = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    path.write_bytes(path.read_bytes() + content + b"\n")
    with pytest.raises(CorruptFileError, match=message) as error:
        QuestionFile(path)
    assert "required is" in str(error.value) or "give each item its own" in str(error.value)


def test_file_without_items_or_text_is_refused(tmp_path: Path) -> None:
    """Catches an evaluation of nothing."""
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(CorruptFileError, match="empty.jsonl holds no item; required is"):
        QuestionFile(tmp_path / "empty.jsonl")
    with pytest.raises(TransformerFamError, match="cannot read '.*missing.jsonl': No such file"):
        QuestionFile(tmp_path / "missing.jsonl")
    (tmp_path / "blank.txt").write_text(" \n")
    questions = QuestionFile(written(tmp_path / "q.jsonl", [{"file": "blank.txt", "question": "Q", "answers": []}]))
    (item,) = questions.items(questions.texts()[0])
    with pytest.raises(TransformerFamError, match="line 1: its text is empty"):
        item.whole_text()


@pytest.mark.parametrize(
    ("answer", "wanted", "exact_match", "f1", "contains", "abstained"),
    [
        ("The Normans!", ["normans", "the Vikings"], 1.0, 1.0, True, False),
        ("the Norman dukes", ["dukes of Norman"], 0.0, 0.8, False, False),
        ("In 1066, I think", ["1066"], 0.0, 0.4, True, False),
        ("10661", ["1066"], 0.0, 0.0, False, False),
        ("It is not mentioned in the text.", ["1066"], 0.0, 0.0, False, True),
        ("It is not mentioned in the text.", [], 1.0, 1.0, True, True),
        ("", [], 1.0, 1.0, True, True),
        ("The text doesn\u2019t say.", [], 1.0, 1.0, True, True),
        ("I'm not sure about that.", [], 1.0, 1.0, True, True),
        ("N/A", [], 1.0, 1.0, True, True),
        ("None.", [], 1.0, 1.0, True, True),
        ("Paris. It was not stated elsewhere.", [], 0.0, 0.0, False, False),
        ("The unknown soldier", ["Unknown Soldier"], 1.0, 1.0, True, False),
        ("It is C++.", ["C"], 0.0, 0.5, False, False),
        ("-5", ["5"], 1.0, 1.0, False, False),
        ("about 3 14", ["3.14"], 0.0, 0.0, False, False),
        ("1066", [], 0.0, 0.0, False, False),
    ],
)
def test_answers_are_scored_as_squad_does(
    answer: str, wanted: list[str], exact_match: float, f1: float, contains: bool, abstained: bool
) -> None:
    """Catches articles, case and punctuation that count, part of a number taken for it, and a wrong answer as none."""
    found = score_answer(answer, wanted)
    assert found.pop("f1") == pytest.approx(f1, abs=1e-5)
    assert found == {"exact_match": exact_match, "contains": contains, "abstained": abstained}


def test_every_text_is_read_once_and_asked_of_by_all(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a reading for every question, one that the question before has changed, and texts that mix in a batch."""
    systems = ("fam", "fam_memory_swapped", "fam_memory_initial", QUESTION_ALONE)
    model, tokenizer = load_model(folder, config_overrides=WIDER)
    evaluation = AnswersEvaluation(
        questions=QuestionFile(path), systems=systems, template=TEMPLATE, max_new_tokens=3, batch_size=3
    )
    num_read, read = 0, AnswersEvaluation._read

    def counted(*arguments: Any) -> Any:
        nonlocal num_read
        num_read += 1
        return read(*arguments)

    monkeypatch.setattr(AnswersEvaluation, "_read", counted)
    done: list[float] = []
    evaluation.progress = done.append
    rows = list(evaluation.rows(model, tokenizer))
    assert num_read == 1
    assert len(rows) == 4 * len(systems) == evaluation.num_questions == done[-1]
    assert done == sorted(done)
    alone = rows_of(path, folder, batch_size=1)
    assert said(alone).items() <= said(rows).items()
    assert len(set(said(rows).values())) > 1
    for row in alone:
        if not row["wanted"] or "num_choices" in row:
            continue
        text = next(item["text"] for number, item in enumerate(ITEMS, 1) if row["question"] == item["question"])
        state = model.read(tokenizer(text, return_tensors="pt").input_ids)
        question = tokenizer(TEMPLATE.replace("{question}", row["question"]), return_tensors="pt").input_ids
        options = {"max_new_tokens": 3, "do_sample": False}
        ids = model.generate(question, past_key_values=state, **options)[0, question.shape[1] :]
        assert row["answer"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert row["context_tokens"] == len(tokenizer(text).input_ids)
        assert row["kv_bytes"] == row["context_tokens"] * kv_bytes_per_token(model)


def test_likeliest_choice_is_taken(path: Path, folder: Path) -> None:
    """Catches the likelihood of another token, padding that counts, and long choices that always lose."""
    (row,) = [row for row in rows_of(path, folder) if row.get("num_choices")]
    model, tokenizer = load_model(folder, config_overrides=WIDER)
    scores = {}
    for choice in ITEMS[2]["choices"]:
        context = tokenizer(SUN + TEMPLATE.replace("{question}", "What is yellow?")).input_ids
        ending = tokenizer(f" {choice}").input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + ending])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(ending) - 1)
        total = sum(float(logits[place, token]) for place, token in zip(places, ending, strict=True))
        scores[choice] = total / len(choice)
    assert row["answer"] == max(scores, key=scores.__getitem__)
    assert row["correct"] == (row["answer"] == "the sun")


def test_texts_are_hidden_in_filler_at_their_own_places(path: Path, folder: Path) -> None:
    """Catches a passage at the end of every text, and one place for all lengths."""
    rows = rows_of(path, folder, filler="sentences", filler_lengths=[0, 100, 200], allow_unknown=True)
    depths = {(row["item"], row["filler_tokens"]): row["depth"] for row in rows}
    assert {depths[name, 0] for name in ("grass", "line 3", "line 4")} == {None}
    assert depths["grass", 100] == depths["line 2", 100]
    assert len({depths[name, length] for name in ("grass", "line 3") for length in (100, 200)}) == 4
    assert all(0 <= depth <= 1 for depth in depths.values() if depth is not None)
    lengths = {row["filler_tokens"]: row["context_tokens"] for row in rows if row["item"] == "grass"}
    assert lengths[100] == lengths[0] + 100


def test_what_matches_the_question_is_retrieved(folder: Path) -> None:
    """Catches passages out of order, more than fit, and a question that is not looked at."""
    tokenizer = load_model(folder)[1]
    filler = "The grass is green. Here we go. " * 30
    ids = torch.tensor(tokenizer(f"{filler}The pass key is 12345. {filler}The sun is yellow.").input_ids)
    found = tokenizer.decode(retrieve(tokenizer, ids, "What is the pass key?", 128))
    assert "12345" in found
    assert found.count("The") > 1
    assert 64 < len(retrieve(tokenizer, ids, "What is the pass key?", 128)) <= 128
    assert "pass key" in tokenizer.decode(retrieve(tokenizer, ids, "What is the pass key?", 10))
    two = torch.tensor(tokenizer("Here we go. There and back again. " * 5 + "The sky is blue.").input_ids)
    assert "blue" in tokenizer.decode(retrieve(tokenizer, two, "Which is blue?", len(two) // 2 + 1))
    assert retrieve(tokenizer, ids, "What is the pass key?", 0).numel() == 0


def test_question_alone_and_retrieval_are_asked_without_the_reading(path: Path, folder: Path) -> None:
    """Catches a control that sees the text after all."""
    rows = rows_of(path, folder, systems=(QUESTION_ALONE, BM25))
    bytes_of = {row["system"]: row["state_bytes"] for row in rows}
    assert bytes_of[QUESTION_ALONE] == bytes_of[BM25]
    other = written(path.parent / "other.jsonl", [item | {"text": "Here we go."} for item in ITEMS if "text" in item])
    there, here = said(rows), said(rows_of(other, folder, systems=(QUESTION_ALONE,)))
    for system, name, length in here:
        if name == "grass":
            assert here[system, name, length] == there[system, name, length]


def test_command_asks_reports_and_resumes(path: Path, folder: Path, tmp_path: Path) -> None:
    """Catches questions that are asked twice, controls that are missing, and a table that pools other questions."""
    output, runner = tmp_path / "rows.jsonl", CliRunner()
    systems = "fam,fam_memory_zeroed,fam_memory_swapped,question_alone,full_context,bm25"
    command = ["evaluate", "answers", str(path), "--model", str(folder), "--output", str(output)]
    command += ["--prompt-template", "\\n {question} It is", "--max-new-tokens", "3", "--set", "block_size=32"]

    def done(*more: str, code: int = 0) -> str:
        result = runner.invoke(app, [*command, *more], env={"COLUMNS": "250"})
        assert result.exit_code == code, result.output
        return " ".join(result.output.split())

    text = done("--system", systems)
    rows = read_rows([output])
    assert len(rows) == 4 * 6
    assert {row["system"] for row in rows} == set(systems.split(","))
    assert all(name in text for name in ("exact", "F1", "contains", "right", "wrong", "words"))
    output.write_text("".join(output.read_text().splitlines(keepends=True)[:7]))
    done("--system", systems)
    again = read_rows([output])
    assert said(again) == said(rows)
    assert again[:7] == rows[:7]
    assert "words, 0 tokens of filler" in runner.invoke(app, ["report", str(output)]).output
    one = written(tmp_path / "one.jsonl", ITEMS[:2])
    command[2] = str(one)
    assert "asks about one text, and a swapped memory is that of another" in done(
        "--system", "fam_memory_swapped", code=2
    )
    assert "required is {question} in it" in done("--prompt-template", "no place", code=2)
    assert "there is no system 'bwsa' to load; did you mean bswa" in done("--system", "fam,bwsa", code=2)
    assert "--dtype is 'banana'" in done("--system", "full_context", "--dtype", "banana", code=2)
    assert "nonsense" in done("--system", "full_context", "--set", "nonsense=3", code=2)


@pytest.mark.parametrize("system", ["question_alone", "bm25", "full_context", "bswa"])
def test_control_of_what_has_no_memory_is_refused(system: str, path: Path) -> None:
    """Catches rows under a control's name that are those of something else."""
    with pytest.raises(TransformerFamError, match=f"changes a memory, and {system} has none"):
        AnswersEvaluation(questions=QuestionFile(path), systems=(f"{system}_memory_zeroed",))


def test_swapped_memory_is_that_of_one_text_whatever_the_batch(tmp_path: Path, folder: Path) -> None:
    """Catches a control whose answers depend on how many texts are read side by side."""
    sentences = [
        "The grass is green.",
        "The sky is blue.",
        "The sun is yellow.",
        "Here we go.",
        "There and back again.",
    ]
    items = [
        {"text": " ".join(sentences[number:] + sentences[:number]) * 3, "question": "What is green?", "answers": ["x"]}
        for number in range(5)
    ]
    path, systems = written(tmp_path / "q.jsonl", items), ("fam", "fam_memory_swapped")
    found = [said(rows_of(path, folder, systems=systems, batch_size=size)) for size in (1, 2, 3, 4, 5)]
    assert all(one == found[0] for one in found)
    model, tokenizer = load_model(folder, config_overrides=WIDER)
    evaluation = AnswersEvaluation(questions=QuestionFile(path), systems=systems)
    ids = [torch.tensor(tokenizer(item["text"]).input_ids) for item in items[:3]]
    state = evaluation._read(model, ids, 0)
    swapped = evaluation._changed("fam_memory_swapped", state)
    assert torch.equal(swapped.fams, state.fams[:, [1, 0, 1]])
    assert swapped.row_lengths == state.row_lengths


def test_text_of_a_file_counts_and_not_its_path(
    path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches answers that are kept when a text has changed, and places in filler that depend on where one works."""
    _, tokenizer = load_model(folder, config_overrides=WIDER)
    options = {"template": TEMPLATE, "max_new_tokens": 3, "filler": "sentences", "filler_lengths": [64]}
    rows = rows_of(path, folder, **options)
    monkeypatch.chdir(tmp_path)
    assert [row["depth"] for row in rows_of(Path(path.name), folder, **options)] == [row["depth"] for row in rows]
    (tmp_path / "sun.txt").write_text(GRASS * 4)
    evaluation = AnswersEvaluation(questions=QuestionFile(path), **options)
    assert not finished_questions(rows, evaluation, tokenizer)
    (tmp_path / "persuasion").write_text(SUN)  # as a novel of the package is called
    local = QuestionFile(written(tmp_path / "p.jsonl", [{"file": "persuasion", "question": "Q", "answers": []}]))
    assert local.items(local.texts()[0])[0].whole_text() == SUN


def test_longer_texts_are_added_to_the_same_rows(path: Path, folder: Path, tmp_path: Path) -> None:
    """Catches finished questions that are asked again, and rows that cannot be reported, once filler is given."""
    output, runner = tmp_path / "rows.jsonl", CliRunner()
    command = ["evaluate", "answers", str(path), "--model", str(folder), "--output", str(output)]
    command += ["--filler", "sentences", "--max-new-tokens", "2", "--allow-unknown"]
    assert runner.invoke(app, command).exit_code == 0
    rows = read_rows([output])
    result = runner.invoke(app, [*command, "--filler-tokens", "0,64"])
    assert result.exit_code == 0, result.output
    assert read_rows([output])[:4] == rows
    assert len(read_rows([output])) == 8
    assert runner.invoke(app, [*command, "--prompt-template", "{question}"]).exit_code == 0
    assert runner.invoke(app, ["report", str(output)]).exit_code == 0


def test_table_names_every_system_on_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """Catches names that are cut, or a group that is read as markup."""
    systems = ["fam_gated_memory_swapped", "question_alone"]
    rows = [
        {"task": "answers", "model": "m", "system": system, "group": "[red]x[/blue]", "filler_tokens": 0, "file": "q"}
        | {"questions": "d", "wanted": ["a"] * number, "exact_match": 1.0, "f1": 0.5, "contains": True}
        | {"abstained": False}
        for system in systems
        for number in range(2)
    ]
    console = Console(width=80)
    with console.capture() as captured:
        for table in answers_tables(rows):
            console.print(table)
    assert all(name in captured.get() for name in [*systems, "[red]x[/blue]", "0.50 [0.50, 0.50]", "wrong"])
    assert "\u2026" not in captured.get()


def test_prompt_is_asked_word_for_word_and_scored_by_its_rule(tmp_path: Path, folder: Path) -> None:
    """Catches a prompt in the template, an answer that is cut or too short, and a score under another rule."""
    own = {"prompt": " What is green? It is", "scorer": "all", "max_new_tokens": 7, "depth": 0.25}
    items = [ITEMS[0] | own, ITEMS[1] | {"group": "words"}]
    path = written(tmp_path / "q.jsonl", items)
    rows = rows_of(path, folder, template="\n\n{question} {question}")
    model, tokenizer = load_model(folder, config_overrides=WIDER)
    state = model.read(tokenizer(GRASS, return_tensors="pt").input_ids)
    ids = tokenizer(own["prompt"], return_tensors="pt").input_ids
    expected = model.generate(ids, past_key_values=state, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
    assert rows[0]["answer"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert (rows[0]["scorer"], rows[0]["depth"], rows[1]["depth"]) == ("all", 0.25, None)
    assert rows[0]["score"] == score_answer(rows[0]["answer"], ["The grass"], "all")["score"]
    assert "score" not in rows[1]
    console = Console(width=200)
    with console.capture() as captured:
        for table in answers_tables(rows):
            console.print(table)
    assert all(name in captured.get() for name in ("score", "F1", f"{rows[0]['score']:.2f} ["))


@pytest.mark.parametrize(
    ("scorer", "answer", "wanted", "score"),
    [
        ("all", "THE keys are 12 and 45.", ["12", "34", "45", "the"], 0.75),
        ("any", "They are 12.", ["34", "12"], 1.0),
        ("any", "They are 12.", ["34"], 0.0),
        ("numbers", "Paragraph 3, or 4, or 3", ["3"], 2 / 3),
        ("numbers", "none", ["3"], 0.0),
        ("numbers", "13", ["3"], 0.0),
        ("rouge", "the cat sat", ["the cat sat on the mat", "dogs"], 2 / 3),
        ("rouge", "The cat, sat_on: 2 mats.", ["the cat sat on 2 mats"], 1.0),
        ("rouge", "Это правильный ответ", ["Это правильный ответ"], 1.0),
        ("rouge", "这是正确的答案", ["这是正确的"], 10 / 12),
        ("rouge", "un café", ["un cafe"], 0.5),
    ],
)
def test_answer_is_scored_by_the_rule_of_its_item(scorer: str, answer: str, wanted: list[str], score: float) -> None:
    """Catches a mean where the best counts, letters that count, and numbers inside of others."""
    assert score_answer(answer, wanted, scorer) == {"scorer": scorer, "score": pytest.approx(score, abs=1e-6)}


def test_missing_package_of_a_scorer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback after hours of reading."""
    rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingPackageError, match="rouge-score is needed to score summaries; pip install"):
        require_scorers({"rouge"})


def test_items_without_a_text_are_asked_alone(tmp_path: Path, folder: Path) -> None:
    """Catches short tasks that are refused, or asked after another item's text."""
    items = [{"question": "What is green?", "answers": ["x"]}, ITEMS[0], {"question": "What is blue?", "answers": []}]
    path = written(tmp_path / "q.jsonl", items)
    found = said(rows_of(path, folder, systems=("fam", QUESTION_ALONE), batch_size=1))
    for name in ("line 1", "line 3"):
        assert found["fam", name, 0] == found[QUESTION_ALONE, name, 0]
    assert said(rows_of(path, folder, systems=("fam", QUESTION_ALONE), batch_size=4)) == found


def test_rows_of_other_questions_are_not_taken_for_these(path: Path, folder: Path) -> None:
    """Catches an edited file of questions whose old answers are kept."""
    model, tokenizer = load_model(folder)
    rows = rows_of(path, folder)
    evaluation = AnswersEvaluation(questions=QuestionFile(path), template=TEMPLATE, max_new_tokens=3)
    assert len(finished_questions(rows, evaluation, tokenizer)) == 4
    path.write_text(path.read_text().replace("What is green?", "What is yellow?"))
    changed = AnswersEvaluation(questions=QuestionFile(path), template=TEMPLATE, max_new_tokens=3)
    assert not finished_questions(rows, changed, tokenizer)
    assert len(list(changed.rows(model, tokenizer))) == 4


def test_interval_holds_the_mean_and_narrows() -> None:
    """Catches an interval of another share, and one that is not of resampled items."""
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 500)
    assert few.startswith("0.50 [")
    bounds = [[float(part) for part in text[6:-1].split(",")] for text in (few, many)]
    assert all(low < 0.5 < high for low, high in bounds)
    assert bounds[0][1] - bounds[0][0] > 4 * (bounds[1][1] - bounds[1][0])
    assert interval([]) == "-"
