"""Passkeys anywhere in a text, mentioned several times, in other words."""

import pytest
import tiny_models
from handed_over import handed_over
from passkeys import answer_alone, evaluate

from transformerfam.errors import TransformerFamError
from transformerfam.tasks import PasskeyText, draw_keys
from transformerfam.tasks.text import encode
from transformerfam.tasks.wordings import Wording


def text_of_row(tokenizer, row, start):
    """Return the tokens in front of a row's answer, given once at its place."""
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
    for row in rows[:3]:
        ids = text_of_row(tokenizer, row, 0)
        assert row["answer"] == answer_alone(model, tokenizer, ids, len(PasskeyText(tokenizer).key_ids(row["key"])))


def test_a_key_is_told_as_often_as_asked_for(model, tokenizer):
    """Would catch mentions that are dropped, come after the last place, or are not spread."""
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
    """Would catch keys of five digits whatever is set, and digits of an answer that are not read to the end."""
    for digits in (3, 8):
        rows = evaluate(model, tokenizer, num_digits=digits, filler_lengths=[3])
        assert {len(str(row["key"])) for row in rows} == {row["num_digits"] for row in rows} == {digits}
        assert {row["key"] for row in rows} == set(draw_keys(3, 5, digits))
    assert len(set(draw_keys(900, 0, 3))) == 900


WORDING = Wording("The sky is{key}. Remember {key}!", " What is the sky?", " Sky is {key} green", "sky")


@pytest.mark.filterwarnings("ignore:.* of the wording sky's tokens are words that the tokenizer does not know")
def test_another_wording_tells_asks_and_counts_its_own_key(model, tokenizer):
    """Would catch pieces of the paper's wording left in, and a key that is tokenised otherwise than in the text."""
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
    """Would catch a run that gives no key, or a control that is the system itself."""
    with pytest.raises(TransformerFamError, match=message):
        evaluate(model, tokenizer, **options)


class Killed(BaseException):
    """As a kill, which nothing that runs can note."""
