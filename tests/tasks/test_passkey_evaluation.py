"""Passkeys evaluated: one reading per key, evaluated at every length, and resumed."""

import collections
import re

import pytest
import tiny_models
import torch
from handed_over import handed_over
from passkeys import answer_alone, evaluate

from transformerfam.errors import TransformerFamError
from transformerfam.tasks import PasskeyEvaluation, PasskeyText, draw_keys, passkey_evaluation, passkey_reading
from transformerfam.tasks.controls import CONTROLS
from transformerfam.tasks.ragged import greedy_tokens


def test_row_has_every_promised_field(model, tokenizer):
    """Would catch a renamed field, on which reports and other people's scripts rely."""
    row = evaluate(model, tokenizer, model_name="m", max_training_filler_tokens=512)[0]
    assert set(row) == {
        *(
            "task",
            "system",
            "model",
            "seed",
            "weights",
            "config",
            "questions",
            "schema",
            "version",
            "git_commit",
            "machine",
        ),
        *("filler_tokens", "num_blocks", "key", "answer", "correct", "max_training_filler_tokens"),
        *("jitter", "filler", "prefix_tokens", "placing", "num_digits", "num_mentions", "wording"),
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
    """Would catch an old key that is not given, comes after the new one, or counts as right."""
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
    monkeypatch.setattr(passkey_reading, "greedy_tokens", lambda *_: torch.tensor(answers))
    rows = evaluate(model, tokenizer, batch_size=3, filler_lengths=[0], overwritten=True)
    assert [(row["correct"], row["is_outdated"]) for row in rows] == [(False, True), (True, False), (False, False)]


def test_answer_is_right_only_if_the_whole_key_is(tokenizer, monkeypatch):
    """Would catch an accuracy over digits reported as one over keys."""
    model = tiny_models.make_passkey_model()[0]
    text = PasskeyText(tokenizer)
    answers = [text.key_ids(key) for key in draw_keys(3, 5)]
    answers[1] = answers[1][:-1] + [answers[1][-1] ^ 1]
    monkeypatch.setattr(passkey_reading, "greedy_tokens", lambda *_: torch.tensor(answers))
    rows = evaluate(model, tokenizer, batch_size=3, filler_lengths=[0])
    assert [row["correct"] for row in rows] == [True, False, True]


def test_jitter_spreads_questions_over_every_phase_of_a_block():
    """Would catch a question at one phase only, where a model that fails at another looks solved."""
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


@pytest.mark.parametrize("control", CONTROLS)
def test_control_is_asked_of_the_same_reading_with_its_memory_changed(control, model, tokenizer, monkeypatch):
    """Would catch a control that is evaluated without any reading, whose answers are as wrong as they should be."""
    asked = []

    def noted(model, ids_BT, state, *arguments):
        asked.append(state.fork())
        return greedy_tokens(model, ids_BT, state, *arguments)

    monkeypatch.setattr("transformerfam.tasks.passkey_reading.greedy_tokens", noted)
    evaluate(model, tokenizer, systems=("fam", f"fam{control}"), filler_lengths=[40], num_keys=2)
    plain, changed = asked
    assert changed.row_lengths == plain.row_lengths
    assert changed.histories == plain.histories
    expected = {
        "_memory_zeroed": torch.zeros_like(plain.fams),
        "_memory_swapped": plain.fams.roll(1, dims=1),
        "_memory_initial": model.init_state(2).fams,
    }
    assert torch.equal(changed.fams, expected[control])
    assert not torch.equal(changed.fams, plain.fams)
    for layer, other in zip(plain.layers, changed.layers, strict=True):
        block = slice(layer.sections.block, None)
        assert torch.equal(layer.keys[..., block, :], other.keys[..., block, :])


def test_finished_questions_are_left_out_and_the_rest_is_the_same(model, tokenizer):
    """Would catch a resumed run that evaluates twice or gives other answers than one that ran through."""
    rows = evaluate(model, tokenizer)
    options = PasskeyEvaluation(filler_lengths=[3, 40], num_keys=3, seed=5, batch_size=2)
    options.finished = passkey_evaluation.finished_questions(rows[:4], options)
    key = lambda row: (row["key"], row["filler_tokens"])  # noqa: E731
    assert sorted(rows[:4] + list(options.rows(model, tokenizer)), key=key) == sorted(rows, key=key)


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 6}, {"model": "other"}, {"filler": "a.txt"}, {"prefix_tokens": 9}),
        *({"placing": "uniform"}, {"num_digits": 6}, {"num_mentions": 2}, {"wording": "other"}),
    ],
)
def test_rows_of_another_run_do_not_count_as_finished(model, tokenizer, change):
    """Would catch a run that is skipped because another one with the same keys is in the file."""
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


def test_filler_is_handed_over_in_pieces_whatever_the_length(model, tokenizer):
    """Would catch memory that grows with the length: a million tokens of 20 keys must never be held side by side."""
    states = []
    progress = lambda done, total, state: states.append((done, total, state.num_bytes))  # noqa: E731
    with handed_over(model) as given:
        evaluate(model, tokenizer, filler_lengths=[500], progress=progress)
    assert max(ids.shape[1] for ids, _ in given) <= tiny_models.BLOCK_SIZE
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


class Killed(BaseException):
    """As a kill, which nothing that runs can note."""


def test_a_killed_reading_goes_on_from_its_checkpoint(tmp_path, model, tokenizer):
    """Would catch hours of reading lost by a kill, other answers after it, or a checkpoint of other keys taken up."""
    options = {"filler_lengths": [600], "checkpoint": tmp_path / "rows.jsonl", "checkpoint_seconds": 0.0, "num_keys": 2}
    whole = evaluate(model, tokenizer, filler_lengths=[600], num_keys=2)

    def kill():
        if len(killed) == 30:
            raise Killed

    with handed_over(model, kill) as killed, pytest.raises(Killed):
        evaluate(model, tokenizer, **options)
    assert len(list(tmp_path.glob("*.reading.safetensors"))) == 1
    num_before = sum(ids.shape[1] for ids, _ in killed[:29])
    assert evaluate(model, tokenizer, **options, seed=6) == evaluate(
        model, tokenizer, filler_lengths=[600], num_keys=2, seed=6
    )
    with handed_over(model) as given:
        assert evaluate(model, tokenizer, **options) == whole
    assert sum(ids.shape[1] for ids, _ in given) < 640 - num_before + 150
    assert list(tmp_path.glob("*.reading.safetensors")) == []


def test_memory_of_another_text_and_of_none_answer_as_such_readings_would(model, tokenizer):
    """Would catch controls that change nothing, or more than the memory."""
    systems = ("fam", "fam_memory_swapped", "fam_memory_initial")
    rows = evaluate(model, tokenizer, filler_lengths=[40], num_keys=2, systems=systems, jitter=False)
    assert [row["system"] for row in rows] == [system for system in systems for _ in range(2)]
    answers = {system: [row["answer"] for row in rows if row["system"] == system] for system in systems}
    text = PasskeyText(tokenizer)
    for row in rows[:2]:
        sequence = text.sequence(row["key"], 40)
        read = sequence.intro_ids + sequence.filler_ids
        state = model.read(torch.tensor([read]))
        begun = model.init_state(1)
        fill = state.block_fill[0]
        assert fill > 0
        model.read(torch.tensor([read[-fill:]]), begun)  # the same block after the initial FAM
        initial = state.fork().initial_memory()
        for layer, other in zip(initial.layers, begun.layers, strict=True):
            fam = slice(layer.sections.fam, layer.sections.block)
            assert torch.allclose(layer.keys[..., fam, :], other.keys[..., fam, :], atol=1e-5)
            assert torch.allclose(layer.values[..., fam, :], other.values[..., fam, :], atol=1e-5)
        assert torch.equal(initial.fams, begun.fams)
    assert answers["fam_memory_swapped"] != answers["fam"]
