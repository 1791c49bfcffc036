"""Passages, questions on them when they are gone, and the other rows that a memory of text is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_worded_keys import byte_tokenizer
from training_recipes import small_recipe

from transformerfam.errors import RecipeError
from transformerfam.tasks.passages_training import KINDS
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.data.sources import sources_of
from transformerfam.training.tiny import build_tiny_tokenizer
from transformerfam.training.trainer import Trainer

BYTES = byte_tokenizer()
SUBJECTS = ["Anna", "Boris", "Clara", "Dora"]
NO_ANSWER = "The text does not say."


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    lines = []
    for number, name in enumerate(SUBJECTS):
        text = f"{name} keeps {number + 3} hens. She lives in a house by the sea."
        lines.append({"text": text, "question": f"How many hens has {name}?", "answers": [str(number + 3)]})
        lines.append({"text": text, "question": f"Where does {name} live?", "answers": ["by the sea", "in a house"]})
        lines.append({"text": text, "question": f"What is the dog of {name}?", "answers": []})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "books" / "more").mkdir(parents=True)
    (tmp_path / "books" / "one.txt").write_text("It was a fine day, and nobody was at home.\n\n" * 20)
    (tmp_path / "books" / "more" / "two.txt").write_text("Rain fell upon the hills until the evening.\n\n" * 20)
    return {"questions": [str(tmp_path / "questions.jsonl")], "texts": [str(tmp_path / "books")]}


def builder(files: dict[str, Any], tokenizer: Any = BYTES, **data: Any) -> SequenceBuilder:
    schedule = {"steps": 9, "batch_size": 4, "curriculum": [{"filler_tokens": [60, 90]}]}
    return SequenceBuilder(small_recipe(data={"task": "passages"} | files | data, schedule=schedule), tokenizer)


def only(kind: str) -> dict[str, float]:
    return {name: float(name == kind) for name in KINDS}


def rows_of(files: dict[str, Any], steps: int = 6, tokenizer: Any = BYTES, **data: Any) -> list[tuple[str, list[str]]]:
    """Return the text of every row, and its answers in order, as they are predicted."""
    found, made = [], builder(files, tokenizer, **data)
    for step in range(steps):
        batch = made.batch(step, 0)
        for ids, labels, is_key in zip(batch.input_ids_BT, batch.labels_BT, batch.is_key_BT, strict=True):
            runs: list[list[int]] = []
            for place in is_key.nonzero()[:, 0].tolist():
                if place == 0 or not is_key[place - 1]:
                    runs.append([])
                runs[-1].append(int(labels[place]))
            found.append((BYTES.decode(ids), [BYTES.decode(run) for run in runs]))
    return found


def test_answers_are_those_of_the_passage_and_far_behind_it(files: dict[str, Any]) -> None:
    """Catches answers of another passage, questions beside the passage, and answers that are not predicted."""
    seen = set()
    for text, answers in rows_of(files, questions_asked=[1, 2], passage_prefix=[5, 30]):
        (name,) = [name for name in SUBJECTS if f"{name} keeps" in text]
        asked = text.split("\n\nQuestion: ")[1:]
        assert len(asked) == len(answers)
        for question, answer in zip(asked, answers, strict=True):
            assert name in question
            right = [f" {SUBJECTS.index(name) + 3}"] if "hens" in question else [" by the sea", " in a house"]
            assert answer in right
            assert question.split("\nAnswer:")[1].startswith(answer)
            seen.add((name, answer))
        gone = text.split("house by the sea.")[1].split("\n\nQuestion:")[0]
        assert len(gone) >= 60
        assert not text.startswith("\n\n" + name)
    assert len(seen) >= 8


def test_question_on_another_passage_has_no_answer(files: dict[str, Any]) -> None:
    """Catches a question that the text could answer, and a confident answer to one that it cannot."""
    for text, answers in rows_of(files, **only("unanswerable")):
        (name,) = [name for name in SUBJECTS if f"{name} keeps" in text]
        assert name not in text.split("\n\nQuestion: ")[1]
        assert answers == [f" {NO_ANSWER}"]


def test_repeated_words_are_those_that_followed(files: dict[str, Any]) -> None:
    """Catches words of another place, or of a text that was not read."""
    for text, (answer,) in rows_of(files, **only("repeated"), passage_tokens=[1, 200], repeated_words=[4, 6]):
        read, question = text.split('\n\nQuestion: Repeat what came after "')
        cue = question.split('"')[0]
        assert f"{cue}{answer}" in read
        assert 4 <= len(answer.split()) <= 6


def test_pairs_are_asked_in_any_order(files: dict[str, Any]) -> None:
    """Catches values of another name, and two pairs of one name."""
    orders = set()
    tokenizer = build_tiny_tokenizer(["alpha", "bravo", "charlie", "delta", "echo", "golf", "hotel", "india"] * 2)
    options = {"allow_unknown": True, "listed_pairs": [3, 3], "questions_asked": [2, 3], "passage_tokens": [1, 99]}
    made = builder(files | only("pairs"), tokenizer, **options)
    for step in range(4):
        batch = made.batch(step, 0)
        for ids, labels, is_key in zip(batch.input_ids_BT, batch.labels_BT, batch.is_key_BT, strict=True):
            words = tokenizer.convert_ids_to_tokens(ids.tolist())
            answers = [int(token) for token in labels[is_key]]
            values = [tokenizer.convert_ids_to_tokens(answers[n : n + 2]) for n in range(0, len(answers), 2)]
            assert 2 <= len(values) <= 3
            text = " ".join(words)
            for value in values:
                assert text.count(" ".join(value)) == 2  # in the list, and as the answer
            orders.add(
                tuple(text.index(" ".join(value)) for value in values)
                == tuple(sorted(text.index(" ".join(value)) for value in values))
            )
    assert orders == {True, False}


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<us>{% endif %}"
)


def chat_tokenizer(template: str | None, eos_token: str | None = "~") -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, eos_token
    return tokenizer


def test_questions_are_asked_in_turns_of_a_chat(files: dict[str, Any]) -> None:
    """Catches a memory that is only ever asked in the words of a test, and turns that are never ended."""
    with pytest.raises(RecipeError, match="no eos_token, which ends a turn"):
        builder(files, chat_tokenizer(TURNS, None), chat_share=0.5)
    rows = rows_of(files, 20, chat_tokenizer(TURNS), chat_share=0.5, questions_asked=[2, 2])
    in_turns = [(text, answers) for text, answers in rows if "<user>" in text]
    assert 0.3 < len(in_turns) / len(rows) < 0.7
    for text, answers in in_turns:
        assert "Question:" not in text
        assert text.count("<user>") == len(answers) == 2
        for answer in answers:
            assert answer.endswith("~")
            assert f"</><us>{answer}" in text
    assert not any(answer.endswith("~") for text, answers in rows if "Question:" in text for answer in answers)


@pytest.mark.parametrize("template", [None, TURNS])
def test_tasks_without_a_passage_are_answered(template: str | None, files: dict[str, Any], tmp_path: Path) -> None:
    """Catches what a chat model could do before, and is never trained to do with a memory."""
    (tmp_path / "tasks.jsonl").write_text('{"question": "Say the word sun.", "answers": ["sun"]}\n')
    given = files | {"instructions": [str(tmp_path / "tasks.jsonl")]}
    for text, answers in rows_of(given, 2, chat_tokenizer(template), **only("instructed")):
        assert "keeps" not in text
        if template:
            assert f"<user>Say the word sun.</><us>{answers[0]}" in text
            assert answers == ["sun~"]
        else:
            assert text.endswith("\n\nQuestion: Say the word sun.\nAnswer: sun")


def test_kinds_have_their_shares_and_plain_rows_ask_nothing(files: dict[str, Any]) -> None:
    """Catches a kind that is never drawn, and a plain row with an answer."""
    rows = rows_of(files, steps=20, plain=1.0, unanswerable=1.0)
    plain = [text for text, answers in rows if not answers]
    assert 0.15 < len(plain) / len(rows) < 0.55
    assert not any("Question:" in text or "keeps" in text for text in plain)
    assert any(NO_ANSWER in text for text, _ in rows)
    again = builder(files, plain=1.0, unanswerable=1.0)
    assert torch.equal(again.batch(3, 0).input_ids_BT, again.batch(3, 0).input_ids_BT)


def test_run_trains_and_knows_its_files(files: dict[str, Any], tmp_path: Path) -> None:
    """Catches a run that resumes on other questions."""
    schedule = {"steps": 2, "batch_size": 2, "curriculum": [{"filler_tokens": [8, 20]}]}
    data = {"task": "passages", "allow_unknown": True} | files
    recipe = small_recipe(data=data, schedule=schedule)
    assert Trainer(recipe, tmp_path / "run").run().is_complete
    before = sources_of(recipe)
    assert sum(key.startswith("data.") for key in before) == 3
    (tmp_path / "books" / "more" / "two.txt").write_text("Snow fell. " * 20)
    assert sources_of(recipe) != before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"answered": 0.0}, "every weight of data's kinds"),
        ({"questions": []}, "data.questions is empty"),
        ({"texts": ["nowhere"]}, "data.texts"),
        ({"questions": ["nowhere.jsonl"]}, "data.questions: cannot read"),
        ({"passage_tokens": [1, 5]}, "no passage of 1 to 5 tokens"),
        ({"repeated": 1.0, "answered": 0.0, "repeated_words": [90, 90], "passage_tokens": [1, 99]}, "have no 96 words"),
        ({"pairs": 1.0, "answered": 0.0}, "words of one token"),
        ({"no_answer": " "}, "data.no_answer is empty"),
        ({"chat_share": 0.5}, "has no chat template"),
        ({"instructed": 1.0}, "data.instructions is empty"),
        ({"instructed": 1.0, "instructions": ["nowhere.jsonl"]}, "data.instructions: cannot read"),
    ],
)
def test_what_gives_no_row_is_refused(files: dict[str, Any], data: dict[str, Any], message: str) -> None:
    """Catches a run that ends at its first step without saying why."""
    with pytest.raises(RecipeError, match=message):
        builder(files, **data).batch(0, 0)
