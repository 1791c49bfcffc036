"""Tokens drawn and turned into text as they come."""

import random
from typing import Any

import pytest
import torch
from tiny_models import make_passkey_model

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.sampling import Sampler, Sampling, TokenLogprobs
from transformerfam.tasks.speaking import TextStream, speak, trimmed


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters come in parts."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("stops", [[], ["stop"], ["ab", "abc"], ["é", "nowhere"]])
def test_pieces_are_the_text_before_the_stop(stops: list[str]) -> None:
    """Catches half a character, a stop text that is cut by a token, and text that is held back and lost."""
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(["a", "b", "c", " ", "é", "語", "sto", "stop", "s"]) for _ in range(12))
        stream = TextStream(Bytes(), stops)
        said = []
        for token in text.encode():
            said.append(stream.push(token))
            if stream.is_stopped:
                break
        said.append(stream.end())
        places = [text.find(stop) for stop in stops if stop in text]
        assert "".join(said) == stream.text == (text[: min(places)] if places else text)
        assert stream.is_stopped == bool(places)


def test_trimmed_text_has_no_space_around_it() -> None:
    for pieces in ([" ", " a", "  ", "b ", " "], ["a b"], ["", " "], []):
        assert "".join(trimmed(pieces)) == "".join(pieces).strip()


def test_nucleus_leaves_unlikely_tokens_out() -> None:
    """Catches a nucleus that loses the token that reaches the share, or keeps one after it."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, allowed in ((0.4, {0}), (0.5, {0}), (0.7, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=1))
        assert {sampler.draw(logits) for _ in range(400)} == allowed
    cold = Sampler(Sampling(temperature=1e-30, seed=1))
    assert {cold.draw(logits) for _ in range(20)} == {0}
    counts = [Sampler(Sampling(temperature=1.0, seed=seed)).draw(logits) for seed in range(2000)]
    assert abs(counts.count(0) / 2000 - 0.5) < 0.05


def test_values_out_of_range_are_refused() -> None:
    for name, value in (("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("seed", 2**64)):
        with pytest.raises(TransformerFamError, match=f"{name} is .*, required is"):
            Sampling(**{name: value})
    with pytest.raises(TransformerFamError, match="the logits are not numbers"):
        Sampler(Sampling()).draw(torch.full((3,), float("nan")))
    assert TokenLogprobs.of(torch.tensor([0.0, float("-inf")]), 1, 5).logprob == -9999.0


def test_spoken_answer_is_in_the_state() -> None:
    """Catches an answer that the next question does not follow."""
    model, tokenizer = make_passkey_model()
    model: Any = model.eval()
    state = model.init_state()
    text = "".join(speak(model, tokenizer, [5, 6, 7], state, 9, Sampling()))
    again = model.init_state()
    first = "".join(speak(model, tokenizer, [5, 6, 7], again, 4, Sampling()))
    (last,), again.unread_ids = again.unread_ids, [None]
    assert text == first + "".join(speak(model, tokenizer, [last], again, 5, Sampling()))
    assert state.num_tokens_read == 3 + 8
