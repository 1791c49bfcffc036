"""The passkey task: the paper's text, and one reading per key that is asked at every length."""

import collections
import re

import pytest
import tiny_models
import torch
from handed_over import handed_over
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
from transformerfam.tasks.filler import load_shuffled
from transformerfam.tasks.text import encode
from transformerfam.tasks.wordings import Wording
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


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 6}, {"model": "other"}, {"filler": "a.txt"}, {"prefix_tokens": 9}),
        *({"placing": "uniform"}, {"num_digits": 6}, {"num_mentions": 2}, {"wording": "other"}),
    ],
)
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


def test_filler_is_handed_over_in_pieces_whatever_the_length(model, tokenizer):
    """Would catch memory that grows with the length: a million tokens of 20 keys must never stand side by side."""
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


# Keys anywhere, mentioned several times, in other words


def text_of_row(tokenizer, row, start):
    """Return the tokens in front of a row's answer, told once at its place."""
    text = PasskeyText(tokenizer)
    place = row["prefix_tokens"]
    ids = text.filler.slice(start, place).tolist() + text.intro_ids(row["key"])
    rest = row["filler_tokens"] - place + row["jitter"]
    return ids + text.filler.slice(start + place, rest).tolist() + text.question_ids


def test_uniform_keys_stand_in_every_part_of_the_text_and_beyond_the_window(model, tokenizer):
    """Would catch depths that leave out a part of the text, or a key that the question still sees."""
    rows = evaluate(model, tokenizer, filler_lengths=[200, 400], num_keys=8, prefix_tokens="uniform")
    window = tiny_models.BLOCK_SIZE * (model.fam_config.num_memory_segments + 1)
    for length in (200, 400):
        places = sorted(row["prefix_tokens"] for row in rows if row["filler_tokens"] == length)
        free = length - window
        assert [int(8 * (place + 0.99) / free) for place in places] == list(range(8))
        assert max(places) <= length - window
    assert {row["placing"] for row in rows} == {"uniform"}
    for row in rows[:6]:
        ids = text_of_row(tokenizer, row, 0)
        assert row["answer"] == answer_alone(model, tokenizer, ids, len(PasskeyText(tokenizer).key_ids(row["key"])))


def test_a_key_is_told_as_often_as_asked_for(model, tokenizer):
    """Would catch mentions that are dropped, stand behind the last place, or are not spread."""
    intro = PasskeyText(tokenizer).intro_ids(draw_keys(1, 5)[0])
    for prefix, places in ((90, [30, 60, 90]), ("uniform", None)):
        options = {"num_mentions": 3, "filler_lengths": [300], "num_keys": 1, "prefix_tokens": prefix}
        with handed_over(model) as given:
            row = evaluate(model, tokenizer, **options)[0]
        ids = [token for ids_1T, _ in given for token in ids_1T[0].tolist()]
        starts = [i for i in range(len(ids)) if ids[i : i + len(intro)] == intro]
        told = [start - number * len(intro) for number, start in enumerate(starts)]
        assert len(told) == 3 == row["num_mentions"]
        assert told[-1] == row["prefix_tokens"]
        if places is None:
            window = tiny_models.BLOCK_SIZE * (model.fam_config.num_memory_segments + 1)
            third = (300 - window) / 3
            assert [int(place // third) for place in told] == [0, 1, 2]
        else:
            assert told == places


def test_keys_have_as_many_digits_as_asked_for(model, tokenizer):
    """Would catch keys of five digits whatever is asked, and digits of an answer that are not read to the end."""
    for digits in (3, 8):
        rows = evaluate(model, tokenizer, num_digits=digits, filler_lengths=[3])
        assert {len(str(row["key"])) for row in rows} == {row["num_digits"] for row in rows} == {digits}
        assert {row["key"] for row in rows} == set(draw_keys(3, 5, digits))
    assert len(set(draw_keys(900, 0, 3))) == 900


WORDING = Wording("The sky is{key}. Remember {key}!", " What is the sky?", " Sky is {key} green", "sky")


@pytest.mark.filterwarnings("ignore:.* of the wording sky's tokens are words that the tokenizer does not know")
def test_another_wording_tells_asks_and_counts_its_own_key(model, tokenizer):
    """Would catch pieces of the paper's wording left in, and a key that is tokenised otherwise than it stands."""
    text = PasskeyText(tokenizer, wording=WORDING)
    assert text.intro_ids(123) == [
        token for part in ("The sky is", "123", ". Remember", " 123", "!") for token in encode(tokenizer, part)
    ]
    assert text.question_ids == encode(tokenizer, " What is the sky? Sky is")
    rows = evaluate(model, tokenizer, wording=WORDING, filler_lengths=[40])
    assert {row["wording"] for row in rows} == {"sky"}
    row = rows[0]
    sequence = text.sequence(row["key"], row["filler_tokens"] + row["jitter"])
    ids = sequence.intro_ids + sequence.filler_ids + sequence.question_ids
    assert row["answer"] == answer_alone(model, tokenizer, ids, len(sequence.answer_ids))


def test_wording_is_read_from_a_file(tmp_path):
    """Would catch a wording without its key, which no reader could answer."""
    path = tmp_path / "mine.toml"
    good = {"intro": "It is {key}.", "question": "What is it?", "answer": " It is {key}"}
    write = lambda values: path.write_text("\n".join(f'{k} = "{v}"' for k, v in values.items()))  # noqa: E731
    write(good)
    assert Wording.load(path) == Wording(**good, name="mine")
    for change, message in (
        ({"intro": "It is."}, "the intro .* required is at least one {key}"),
        ({"answer": "It is"}, "the answer .* required is {key} once"),
        ({"question": "Is it {key}?"}, "the question .* required is no {key}"),
        ({"more": "x"}, "has intro, question, answer, more, required are intro, question and answer"),
    ):
        write(good | change)
        with pytest.raises(TransformerFamError, match=message):
            Wording.load(path)
    path.write_text("intro = 3")
    with pytest.raises(TransformerFamError, match="has intro, required are"):
        Wording.load(path)
    with pytest.raises(TransformerFamError, match="cannot read the wording"):
        Wording.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mentions": 0}, "num_mentions is 0, required is at least 1"),
        ({"num_digits": 0}, "num_digits is 0, required is 1 to 9"),
        ({"num_digits": 1, "num_keys": 10}, "num_keys is 10, required is 1 to 9, the keys of 1 digits"),
        ({"prefix_tokens": "anywhere"}, "prefix_tokens is 'anywhere'"),
        ({"prefix_tokens": "uniform"}, "a text of 3 tokens has no place for a key"),
        ({"systems": ("fam_memory_swapped",), "batch_size": 1}, "gives each text the memory of another"),
    ],
)
def test_tellings_that_cannot_be_are_refused(model, tokenizer, options, message):
    """Would catch a run that tells nothing, or a control that is the system itself."""
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


def test_text_that_repeats_comes_in_another_order(tmp_path, tokenizer):
    """Would catch a million tokens of one chapter read again and again, word for word."""
    words = ["The sky is blue.", "Here we go again.", "There and back.", "The sun is yellow. The grass is green."]
    book = tmp_path / "book.txt"
    book.write_text(" ".join(words[i % 3] + words[-1] * (i % 5) for i in range(40)), encoding="utf-8")
    stream, plain = load_shuffled(tokenizer, book), FillerStream(encode(tokenizer, book.read_text()), "book")
    n = len(plain)
    assert torch.equal(stream.slice(3, n - 3), plain.slice(3, n - 3))
    again = stream.slice(n, n)
    assert not torch.equal(again, plain.slice(n, n))
    assert torch.equal(again.sort().values, plain.slice(n, n).sort().values)
    assert not torch.equal(stream.slice(2 * n, n), again)
    assert torch.equal(torch.cat((stream.slice(5, n), stream.slice(n + 5, n))), stream.slice(5, 2 * n))
    assert torch.equal(stream.rows(torch.tensor([2, n + 2]), n)[1], stream.slice(n + 2, n))


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
        model.read(torch.tensor([read[-fill:]]), begun)  # the same block behind the initial FAM
        initial = state.fork().initial_memory()
        for layer, other in zip(initial.layers, begun.layers, strict=True):
            fam = slice(layer.sections.fam, layer.sections.block)
            assert torch.allclose(layer.keys[..., fam, :], other.keys[..., fam, :], atol=1e-5)
            assert torch.allclose(layer.values[..., fam, :], other.values[..., fam, :], atol=1e-5)
        assert torch.equal(initial.fams, begun.fams)
    assert answers["fam_memory_swapped"] != answers["fam"]


def test_paragraphs_are_found_by_their_empty_lines(tmp_path):
    """Would catch paragraphs cut in their middle where the tokenizer shows where they end."""
    paragraphs = ["a b c", "d e", "f g h i", "k l", "m"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", "\n", *"abcdefghiklm"])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    lines = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    book = tmp_path / "book.txt"
    book.write_text(" \n \n ".join([*paragraphs, ""]), encoding="utf-8")
    stream = load_shuffled(lines, book)
    again = lines.decode(stream.slice(2 * len(stream), len(stream)))
    assert sorted(part.strip() for part in again.split("\n") if part.strip()) == sorted(paragraphs)
    assert again != lines.decode(stream.slice(0, len(stream)))
