"""Next-token loss and accuracy, and text that comes in pieces."""

import math

import pytest
import tiny_models
import torch
from torch.nn import functional as F

from transformerfam.errors import ReadInterrupted, TransformerFamError
from transformerfam.tasks import evaluate_next_token, next_token
from transformerfam.tasks.next_token import rechunk
from transformerfam.tasks.reading import count_tokens, generate_text, read_text_stream
from transformerfam.tasks.text import decode_utf8, encode, read_text, stream_token_ids

TEXT = "The grass is green. The sky is blue. Here we go again. What is the pass key? 12345 is it. " * 12


@pytest.fixture(scope="module")
def pair():
    return tiny_models.make_passkey_model()


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_loss_and_accuracy_are_those_of_one_pass_over_the_text(pair, book, monkeypatch):
    """Would catch a token at a seam between pieces that is predicted twice, or not at all."""
    model, tokenizer = pair
    monkeypatch.setattr(next_token, "PIECE_TOKENS", 7)
    row = list(evaluate_next_token(model, tokenizer, book, num_tokens=60))[-1]
    ids = torch.tensor([encode(tokenizer, TEXT)[:60]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    assert row["num_tokens"] == 60
    assert row["num_predicted"] == 59
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, ids[0, 1:]).item(), abs=1e-5)
    assert row["accuracy"] == pytest.approx((logits.argmax(-1) == ids[0, 1:]).float().mean().item())


def test_segments_cover_the_text_once_and_average_to_the_whole(pair, book):
    """Would catch a segment row with tokens of its neighbour."""
    *segments, whole = evaluate_next_token(*pair, book, num_tokens=100, segment_tokens=30)
    assert [row["first_token"] for row in segments] == [0, 30, 60]
    assert [row["num_predicted"] for row in segments] == [29, 30, 30]
    assert whole["num_predicted"] == 99
    *exact, whole = evaluate_next_token(*pair, book, num_tokens=90, segment_tokens=30)
    mean = sum(row["loss"] * row["num_predicted"] for row in exact) / 89
    assert whole["loss"] == pytest.approx(mean)


def test_row_has_every_promised_field(pair, book):
    """Would catch a renamed field."""
    row = next(evaluate_next_token(*pair, book, num_tokens=10, system="bswa", model_name="m"))
    assert set(row) == {
        *("task", "system", "model", "seed", "weights", "config", "schema", "version", "git_commit", "machine"),
        *("file", "first_token", "num_tokens", "num_predicted", "loss", "accuracy"),
    }
    assert (row["task"], row["system"], row["model"], row["file"]) == ("next-token", "bswa", "m", "book.txt")
    assert math.isfinite(row["loss"])


def test_file_is_read_in_pieces_and_the_state_stays_its_size(pair, book):
    """Would catch memory that grows with the text."""
    seen = []
    list(evaluate_next_token(*pair, book, progress=lambda done, total, state: seen.append((done, state.num_bytes))))
    assert seen[-1][0] == len(encode(pair[1], TEXT))
    assert len({size for _, size in seen}) == 1


@pytest.mark.parametrize(("content", "position"), [(b"ab\xffcd", 2), ("h\u00e9".encode() * 40_000 + b"\xc3", 120_000)])
def test_text_that_is_not_utf8_is_refused_with_the_byte_position(pair, tmp_path, content, position):
    """Would catch a replaced character, or a position counted from the start of a piece; the second is cut off."""
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(TransformerFamError, match=f"latin.txt is not UTF-8: byte 0x.. at position {position} .*iconv"):
        read_text(path)


def test_wrong_byte_behind_a_cut_character_keeps_its_position():
    """Would catch an error counted from the held-back byte of a character that two pieces share."""
    with pytest.raises(TransformerFamError, match="byte 0xe2 at position 1 "):
        list(decode_utf8([b"a\xe2\x82", b"b"], "standard input"))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "holds 0 tokens, at least 2 are required"),
        ("The", {}, "holds 1 tokens, at least 2"),
        ("The sky", {"num_tokens": 1}, "num_tokens is 1, required is at least 2"),
        ("The sky", {"segment_tokens": 0}, "segment_tokens is 0, required is at least 1"),
    ],
)
def test_too_little_text_or_number_out_of_range_is_refused(pair, tmp_path, content, options, message):
    """Would catch a loss of 0/0."""
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(TransformerFamError, match=message):
        list(evaluate_next_token(*pair, path, **options))


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 7, 1000])
def test_bytes_cut_anywhere_give_the_ids_of_the_whole_text(pair, num_bytes):
    """Would catch a character cut in two by a pipe, or a word tokenised in two halves."""
    text = "The sk\u00fd is \u20ac blue\u2014\U0001f333 green. 12345  back\n\nagain  . " * 30
    content = text.encode()
    pieces = (content[start : start + num_bytes] for start in range(0, len(content), num_bytes))
    streamed = stream_token_ids(decode_utf8(pieces, "standard input"), pair[1], piece_chars=50)
    assert [i for ids in streamed for i in ids] == encode(pair[1], text)


def test_tokenizer_that_adds_its_own_space_gives_the_ids_of_the_whole_text():
    """Would catch a doubled space at every cut, as SentencePiece models would read it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["?", "\u2581", "\u2581the", "\u2581sun", "\u2581is", "\u2581up"])}
    core = Tokenizer(models.WordLevel(words, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    text = "the sun is up " * 40 + "the sun"
    streamed = [i for ids in stream_token_ids([text], tokenizer, piece_chars=30) for i in ids]
    assert streamed == encode(tokenizer, text)


def test_text_without_spaces_is_still_cut(pair):
    """Would catch a buffer that grows without end on one long line."""
    assert max(len(ids) for ids in stream_token_ids(["5" * 500], pair[1], piece_chars=20)) <= 21


def test_rechunk_keeps_ids_and_ends_at_multiples():
    """Would catch lost or doubled ids at the limit."""
    pieces = list(rechunk([[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]], 3, limit=9, multiple=5))
    assert pieces == [[0, 1, 2], [3, 4], [5, 6, 7], [8]]


# Reading into a state


def test_stream_reads_as_all_ids_at_once(pair):
    """Would catch a token lost where two pieces meet."""
    model, tokenizer = pair
    state = read_text_stream(model, tokenizer, [TEXT[:77], TEXT[77:]])
    whole = model.read(encode(tokenizer, TEXT))
    assert state.row_lengths == whole.row_lengths
    torch.testing.assert_close(state.fams, whole.fams, atol=1e-5, rtol=1e-5)


def test_interrupted_reading_goes_on_where_it_stopped(pair):
    """Would catch tokens read twice, or left out, after Ctrl-C."""
    model, tokenizer = pair

    def interrupt(done, state):
        if done >= 40:
            raise KeyboardInterrupt

    with pytest.raises(ReadInterrupted, match="interrupted after") as caught:
        read_text_stream(model, tokenizer, [TEXT], progress=interrupt)
    done = caught.value.num_tokens_done
    assert 40 <= done < 60
    assert caught.value.state.num_tokens_read == done
    state = read_text_stream(model, tokenizer, [TEXT], caught.value.state, skip_tokens=done)
    torch.testing.assert_close(state.fams, model.read(encode(tokenizer, TEXT)).fams, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("text", "skip"), [("", 0), ("The sky", 5)])
def test_nothing_to_read_is_refused(pair, text, skip):
    """Would catch a state saved as if something had been read."""
    with pytest.raises(TransformerFamError, match=f"{skip} of them are skipped, at least 1 is required"):
        read_text_stream(*pair, [text], skip_tokens=skip)


def test_tokens_of_a_file_are_counted(pair, book):
    """Would catch a progress bar that never reaches its end."""
    assert count_tokens(book, pair[1]) == len(encode(pair[1], TEXT))


def test_empty_question_is_refused(pair):
    """Would catch a generation from nothing."""
    with pytest.raises(TransformerFamError, match="the question is empty"):
        generate_text(*pair, "", pair[0].init_state(), 3)
