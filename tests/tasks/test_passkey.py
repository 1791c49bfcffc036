"""The passkey task: the paper's text, its keys and its fillers."""

import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformerfam.errors import TransformerFamError
from transformerfam.tasks import FillerStream, PasskeyText, build_passkey, draw_keys
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
    """Would catch a cheap training path that drifts from the evaluation's questions."""
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
    """Would catch doubled keys, which would be queried once only, and draws that change with the number of keys."""
    keys = draw_keys(500, seed=3)
    assert len(set(keys)) == 500
    assert all(re.fullmatch("[1-9][0-9]{4}", str(key)) for key in keys)
    assert draw_keys(20, seed=3) == keys[:20] != draw_keys(20, seed=4)


@pytest.mark.parametrize("num_keys", [0, 90_001])
def test_number_of_keys_out_of_range_is_refused(num_keys):
    """Would catch an empty run that looks like a finished one."""
    with pytest.raises(TransformerFamError, match=f"num_keys is {num_keys}, required is 1 to 90000"):
        draw_keys(num_keys, seed=0)


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
