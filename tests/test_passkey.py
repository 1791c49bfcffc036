"""The passkey task: the paper's text, and one reading per key that is asked at every length."""

import collections
import re

import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformerfam.errors import TransformerFamError
from transformerfam.tasks import (
    FillerStream,
    PasskeyEvaluation,
    PasskeyText,
    build_passkey,
    draw_keys,
    evaluate_passkey,
    passkey_evaluation,
)
from transformerfam.tasks.text import encode
from transformerfam.training.tiny import build_tiny_tokenizer

PAPERS_TEXT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there. The pass key is 12345. Remember it. 12345 is the pass key. The grass is "
    "green. The sky is blue. The sun is yellow. Here we go. There and back again. What is the pass key? The pass "
    "key is 12345"
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_models.make_passkey_model()[0]


def evaluate(model, tokenizer, **changes):
    options = {"filler_lengths": [3, 40], "num_keys": 3, "seed": 5, "batch_size": 2} | changes
    return list(evaluate_passkey(model, tokenizer, **options))


# The text


def test_text_is_the_papers_word_for_word(tokenizer):
    """Would catch a lost space or sentence: the accuracy would no longer be that of the paper's task."""
    text = PasskeyText(tokenizer)
    sequence = text.sequence(12345, len(text.filler))
    assert tokenizer.decode(sequence.ids) == PAPERS_TEXT
    assert sequence.ids == encode(tokenizer, PAPERS_TEXT)


def test_pieces_are_intro_filler_question_answer(tokenizer):
    """Would catch a piece that holds a part of its neighbour, for example a question that gives the key away."""
    sequence = build_passkey(tokenizer, 98765, PasskeyText(tokenizer).filler, 7)
    assert tokenizer.decode(sequence.intro_ids).endswith("Remember it. 98765 is the pass key.")
    assert tokenizer.decode(sequence.filler_ids) == " The grass is green. The sky"
    assert tokenizer.decode(sequence.question_ids) == " What is the pass key? The pass key is"
    assert tokenizer.decode(sequence.answer_ids) == " 98765"


def test_every_key_takes_equally_many_tokens_and_one_per_digit(tokenizer):
    """Would catch a cheap path for digits that differs from the tokenizer's own result."""
    text = PasskeyText(tokenizer)
    for key in draw_keys(50, seed=1):
        assert text.key_ids(key) == encode(tokenizer, f" {key}")
    assert len(set(map(len, map(text.key_ids, (10_000, 99_999, 50_505))))) == 1


def word_tokenizer(vocabulary):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *vocabulary])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


def test_tokenizer_that_joins_digits_is_served_by_itself():
    """Would catch keys spelt in single digits for a tokenizer that knows whole numbers (as GPT-2's does in part)."""
    joining = word_tokenizer(["1234567890", "12345", "54321"])
    text = PasskeyText(joining)
    assert text.key_ids(54321) == encode(joining, "54321")
    assert len(text.key_ids(54321)) == 1


def test_tokenizer_without_digits_is_refused():
    """Would catch keys that are all the same unknown token, so that every answer is right."""
    with pytest.raises(
        TransformerFamError, match="no tokens for the digits of a passkey.*use a model whose vocabulary"
    ):
        PasskeyText(word_tokenizer(["The", "grass"]))


def test_batch_rows_are_the_single_texts(tokenizer):
    """Would catch a cheap training path that drifts from what the evaluation asks."""
    text = PasskeyText(tokenizer)
    keys, starts = [12345, 67890], torch.tensor([0, 11])
    batch = text.batch(keys, 30, starts)
    for row, key, start in zip(batch.tolist(), keys, starts.tolist(), strict=True):
        assert row == text.sequence(key, 30, start).ids


def test_batch_of_keys_with_different_token_counts_is_refused():
    """Would catch a ragged batch that torch refuses without saying why."""
    text = PasskeyText(word_tokenizer(["1234567890", "12345", "67", "890"]))
    text.key_ids = lambda key: [1] * (1 if key == 12345 else 2)
    with pytest.raises(TransformerFamError, match=r"keys take \[1, 2\] tokens.*every digit its own token"):
        text.batch([12345, 67890], 4)


def test_filler_repeats_from_any_offset(tokenizer):
    """Would catch a slice that stops at the end of the book instead of going round."""
    stream = FillerStream([7, 8, 9], "x")
    assert stream.slice(2, 5).tolist() == [9, 7, 8, 9, 7]
    assert stream.rows(torch.tensor([0, 1_000_000_001]), 3).tolist() == [[7, 8, 9], [9, 7, 8]]


def test_empty_filler_is_refused(tmp_path, tokenizer):
    """Would catch a division by zero far from the empty file."""
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(TransformerFamError, match=r"filler 'empty.txt' has 0 tokens, at least 1 is required"):
        PasskeyText(tokenizer, tmp_path / "empty.txt")


def test_missing_filler_file_is_named(tmp_path, tokenizer):
    """Would catch a bare FileNotFoundError."""
    with pytest.raises(TransformerFamError, match="cannot read .*nowhere.txt"):
        PasskeyText(tokenizer, tmp_path / "nowhere.txt")


def test_keys_have_five_digits_differ_and_follow_the_seed():
    """Would catch doubled keys, which would be asked once only, and draws that change with the number of keys."""
    keys = draw_keys(500, seed=3)
    assert len(set(keys)) == 500
    assert all(re.fullmatch("[1-9][0-9]{4}", str(key)) for key in keys)
    assert draw_keys(20, seed=3) == keys[:20] != draw_keys(20, seed=4)


@pytest.mark.parametrize("num_keys", [0, 90_001])
def test_number_of_keys_out_of_range_is_refused(num_keys):
    """Would catch an empty run that looks like a finished one."""
    with pytest.raises(TransformerFamError, match=f"num_keys is {num_keys}, required is 1 to 90000"):
        draw_keys(num_keys, seed=0)


# The evaluation


def test_row_has_every_promised_field(model, tokenizer):
    """Would catch a renamed field, on which reports and other people's scripts rely."""
    row = evaluate(model, tokenizer, model_name="m", max_training_filler_tokens=512)[0]
    assert set(row) == {
        *("task", "system", "model", "seed", "version", "git_commit", "machine"),
        *("filler_tokens", "num_blocks", "key", "answer", "correct", "max_training_filler_tokens"),
        *("jitter", "filler", "prefix_tokens"),
    }
    assert (row["task"], row["system"], row["model"], row["seed"]) == ("passkey", "fam", "m", 5)
    assert (row["filler_tokens"], row["filler"], row["max_training_filler_tokens"]) == (3, "sentences", 512)
    assert re.search(r"\d+ cores", row["machine"])


def test_every_key_is_asked_at_every_length_once(model, tokenizer):
    """Would catch a batch whose last, shorter part is dropped."""
    rows = evaluate(model, tokenizer)
    assert sorted((row["key"], row["filler_tokens"]) for row in rows) == sorted(
        (key, length) for key in draw_keys(3, 5) for length in (3, 40)
    )


def answer_alone(model, tokenizer, ids, num_tokens):
    """Read a text in one piece, and say the likeliest tokens one by one."""
    said = []
    with torch.no_grad():
        for _ in range(num_tokens):
            said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return tokenizer.decode(said).strip()


def test_forked_batched_reading_answers_as_each_text_read_alone(model, tokenizer):
    """Would catch a question that spoils the reading it was forked from, a wrong jitter, or rows that mix."""
    text = PasskeyText(tokenizer)
    for row in evaluate(model, tokenizer, prefix_tokens=5):
        prefix = text.filler.slice(-5, 5).tolist()
        sequence = text.sequence(row["key"], row["filler_tokens"] + row["jitter"])
        ids = prefix + sequence.intro_ids + sequence.filler_ids + sequence.question_ids
        assert row["answer"] == answer_alone(model, tokenizer, ids, len(sequence.answer_ids))
        num_read = 5 + len(sequence.intro_ids) + len(sequence.filler_ids)
        assert row["num_blocks"] == num_read // tiny_models.BLOCK_SIZE


def test_another_key_is_told_in_front_of_the_prefix(model, tokenizer):
    """Would catch an old key that is not told, stands behind the new one, or counts as right."""
    text = PasskeyText(tokenizer)
    rows = evaluate(model, tokenizer, prefix_tokens=5, overwritten=True)
    assert len({row["old_key"] for row in rows} | {row["key"] for row in rows}) == 2 * len(draw_keys(3, 5))
    for row in rows:
        before = text.intro_ids(row["old_key"]) + text.filler.slice(-5, 5).tolist()
        sequence = text.sequence(row["key"], row["filler_tokens"] + row["jitter"])
        ids = before + sequence.intro_ids + sequence.filler_ids + sequence.question_ids
        assert row["answer"] == answer_alone(model, tokenizer, ids, len(sequence.answer_ids))
        assert not row["is_outdated"]
    options = PasskeyEvaluation(filler_lengths=[3, 40], num_keys=3, seed=5, prefix_tokens=5)
    assert passkey_evaluation.finished_questions(rows, options) == frozenset()


def test_an_old_key_is_told_from_a_wrong_one(tokenizer, monkeypatch):
    """Would catch an answer with the old key that is counted as any wrong one."""
    model = tiny_models.make_passkey_model()[0]
    text = PasskeyText(tokenizer)
    keys = draw_keys(6, 5)
    answers = [text.key_ids(key) for key in (keys[3], keys[1], keys[3])]  # the first one's old key, the second's own
    monkeypatch.setattr(passkey_evaluation, "greedy_tokens", lambda *_: torch.tensor(answers))
    rows = evaluate(model, tokenizer, batch_size=3, filler_lengths=[0], overwritten=True)
    assert [(row["correct"], row["is_outdated"]) for row in rows] == [(False, True), (True, False), (False, False)]


def test_answer_is_right_only_if_the_whole_key_is(tokenizer, monkeypatch):
    """Would catch an accuracy over digits reported as one over keys."""
    model = tiny_models.make_passkey_model()[0]
    text = PasskeyText(tokenizer)
    answers = [text.key_ids(key) for key in draw_keys(3, 5)]
    answers[1] = answers[1][:-1] + [answers[1][-1] ^ 1]
    monkeypatch.setattr(passkey_evaluation, "greedy_tokens", lambda *_: torch.tensor(answers))
    rows = evaluate(model, tokenizer, batch_size=3, filler_lengths=[0])
    assert [row["correct"] for row in rows] == [True, False, True]


def test_jitter_spreads_questions_over_every_phase_of_a_block():
    """Would catch a question that stands at one phase only, where a model that fails at another looks solved."""
    options = PasskeyEvaluation(filler_lengths=[64], num_keys=16)
    assert sorted(options.jitters(64, 16)) == list(range(16))
    few = PasskeyEvaluation(filler_lengths=[64], num_keys=5)
    phases = collections.Counter(j for length in range(64, 6400, 64) for j in few.jitters(length, 16))
    assert set(phases) == set(range(16))
    assert max(few.jitters(64, 16)) < 16


def test_jitter_can_be_switched_off(model, tokenizer):
    """Would catch lengths that are never exact."""
    assert {row["jitter"] for row in evaluate(model, tokenizer, jitter=False)} == {0}


def test_zeroed_memory_is_asked_on_a_fork_of_its_own(model, tokenizer):
    """Would catch the control spoiling the measured system, or the other way round."""
    alone = evaluate(model, tokenizer)
    both = evaluate(model, tokenizer, systems=("fam_memory_zeroed", "fam"))
    assert [row for row in both if row["system"] == "fam"] == alone
    zeroed = [row["answer"] for row in both if row["system"] == "fam_memory_zeroed"]
    assert len(zeroed) == len(alone)
    assert zeroed != [row["answer"] for row in alone]


def test_finished_questions_are_left_out_and_the_rest_is_the_same(model, tokenizer):
    """Would catch a resumed run that asks twice or gives other answers than one that ran through."""
    rows = evaluate(model, tokenizer)
    options = PasskeyEvaluation(filler_lengths=[3, 40], num_keys=3, seed=5, batch_size=2)
    options.finished = passkey_evaluation.finished_questions(rows[:4], options)
    key = lambda row: (row["key"], row["filler_tokens"])  # noqa: E731
    assert sorted(rows[:4] + list(options.rows(model, tokenizer)), key=key) == sorted(rows, key=key)


@pytest.mark.parametrize("change", [{"seed": 6}, {"model": "other"}, {"filler": "a.txt"}, {"prefix_tokens": 9}])
def test_rows_of_another_run_do_not_count_as_finished(model, tokenizer, change):
    """Would catch a run that is skipped because another one with the same keys stands in the file."""
    rows = [row | change for row in evaluate(model, tokenizer)]
    options = PasskeyEvaluation(filler_lengths=[3, 40], num_keys=3, seed=5)
    assert passkey_evaluation.finished_questions(rows, options) == frozenset()


def test_book_filler_starts_at_another_place_for_each_key(tmp_path, model, tokenizer):
    """Would catch all keys hidden in the same page."""
    book = tmp_path / "book.txt"
    book.write_text("The sky is blue. Here we go again. There and back. " * 20, encoding="utf-8")
    rows = evaluate(model, tokenizer, filler=book)
    assert {row["filler"] for row in rows} == {"book.txt"}
    seen = []
    read = model.read
    try:
        model.read = lambda ids, *rest, **options: seen.append(ids) or read(ids, *rest, **options)
        evaluate(model, tokenizer, filler=book, filler_lengths=[40])
    finally:
        model.read = read
    assert not torch.equal(seen[1][0], seen[1][1])


def test_filler_is_handed_over_in_pieces_whatever_the_length(model, tokenizer, monkeypatch):
    """Would catch memory that grows with the length: a million tokens of 20 keys must never stand side by side."""
    monkeypatch.setattr(passkey_evaluation, "READ_TOKENS", 32)
    widths, states = [], []
    read = model.read
    try:
        model.read = lambda ids, *rest, **options: widths.append(ids.shape[1]) or read(ids, *rest, **options)
        progress = lambda done, total, state: states.append((done, total, state.num_bytes))  # noqa: E731
        evaluate(model, tokenizer, filler_lengths=[500], progress=progress)
    finally:
        model.read = read
    assert max(widths) <= max(32, len(PasskeyText(tokenizer).intro_ids(12345)))
    assert states[-1][:2] == (1500, 1500)
    assert len({size for _, _, size in states[:10]}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filler_lengths": []}, r"filler_lengths is \[\], required are one or more"),
        ({"filler_lengths": [-1]}, r"filler_lengths is \[-1\].*at least 0"),
        ({"batch_size": 0}, "batch_size is 0, required is at least 1"),
        ({"systems": ()}, "systems is empty"),
        ({"num_keys": 0}, "num_keys is 0"),
        ({"prefix_tokens": -1}, "prefix_tokens is -1"),
    ],
)
def test_options_out_of_range_are_refused(model, tokenizer, options, message):
    """Would catch a run of hours that fails at its end, or does nothing."""
    with pytest.raises(TransformerFamError, match=message):
        evaluate(model, tokenizer, **options)
