"""The most text that fits is found, whatever a tokenizer does with the spaces between two pieces."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.made_questions import Lengths, MadeQuestion


def test_line_keeps_a_depth_of_zero() -> None:
    """Catches a number that is left out since it is False in Python."""
    made = MadeQuestion(
        text="a", prompt="b", question="c", answers=["d"], scorer="all", max_new_tokens=1, id="e", depth=0.0
    )
    assert json.loads(made.line())["depth"] == 0.0
    assert "choices" not in made.line()


class Words:
    """A tokenizer of whole words, with so many tokens more for every text, and some that no single text has."""

    def __init__(self, num_more: int = 0, joins: bool = False) -> None:
        self.num_more, self.joins = num_more, joins

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": self.ids(text) if isinstance(text, str) else list(map(self.ids, text))}

    def ids(self, text: str) -> list[int]:
        joined = text.replace("end. Begin", "endBegin") if self.joins else text
        return [7] * self.num_more + [len(word) for word in joined.split()]

    def decode(self, ids: list[int]) -> str:
        return "x" * len(ids)


def question(sentences: list[str]) -> MadeQuestion:
    values: dict[str, Any] = {"question": "Who?", "answers": ["a"], "scorer": "all", "max_new_tokens": 5}
    return MadeQuestion(text=" ".join(["The text. ", *sentences]), prompt="\nWho?", **values)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=30, max_size=60),
    st.integers(45, 200),
    st.one_of(st.none(), st.integers(2, 50)),
    st.sampled_from([Words(), Words(num_more=1), Words(joins=True)]),
)
def test_largest_text_is_found(numbers: list[int], num_tokens: int, near: int | None, tokenizer: Words) -> None:
    """Catches a text that is too long by what pieces do not show, one with room left, and a search without an end."""
    sentences = [f"Begin {'word ' * number}end." for number in numbers]
    lengths = Lengths(tokenizer)
    fitting = [n for n in range(1, len(sentences) + 1) if lengths.of(question(sentences[:n])) <= num_tokens]
    if len(fitting) == len(sentences):
        with pytest.raises(TransformerFamError, match="is too long, there is text for fewer than"):
            lengths.fit(lambda size: question(sentences[:size]), num_tokens, 1, len(sentences), near)
        return
    found = lengths.fit(lambda size: question(sentences[:size]), num_tokens, 1, len(sentences), near)
    assert (found.size, found.num_tokens) == (fitting[-1], lengths.of(found.question))
    assert found.question == question(sentences[: found.size])


def test_pieces_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a text of a million tokens that is tokenised for every size that is tried."""
    asked: list[str] = []
    tokenizer = Words()
    monkeypatch.setattr(Words, "ids", lambda self, text: asked.append(text) or [1] * len(text.split()))
    lengths = Lengths(tokenizer)
    del asked[:]
    lengths.fit(lambda size: question([f"Number {n} is here." for n in range(size)]), 900, 1)
    whole = [text for text in asked if len(text) > 2000]
    assert len(whole) == 1
    assert len(asked) < 900
