"""Tokens as text while they are drawn: characters that are whole, and nothing from a stop text on."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from transformerfam.decoder.generation import read_last_tokens
from transformerfam.fam.state import FamState
from transformerfam.tasks.sampling import Sampler, Sampling
from transformerfam.tasks.text import end_ids

CONTEXT_TOKENS = 6
HALF_CHARACTER = "\ufffd"


class TextStream:
    """Turn tokens into text as they come; the pieces joined are the text of all tokens.

    Args:
        tokenizer: of the model.
        stops: texts before which the answer ends.
        context: the tokens in front, on which the text of the first ones depends (spaces).

    Attributes:
        text: all that was given out.
        is_stopped: whether a stop text has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.text = ""
        self.is_stopped = False
        self._held = ""  # text that may be the beginning of a stop text
        self._window = list(context)[-CONTEXT_TOKENS:]  # tokens that are decoded together
        self._num_said = len(self._window)  # of them

    def push(self, token: int) -> str:
        """Return the text that a token completes, often none."""
        if self.is_stopped:
            return ""
        self._window.append(token)
        before, now = self._decoded(self._window[: self._num_said]), self._decoded(self._window)
        if now.endswith(HALF_CHARACTER) or len(now) <= len(before):
            return ""
        self._window = self._window[-CONTEXT_TOKENS:]
        self._num_said = len(self._window)
        return self._give(now[len(before) :])

    def end(self) -> str:
        """Return what was held back."""
        if self.is_stopped:
            return ""
        before, now = self._decoded(self._window[: self._num_said]), self._decoded(self._window)
        self._num_said = len(self._window)
        given = self._give(now[len(before) :])
        if self.is_stopped:
            return given
        rest, self._held = self._held, ""
        self.text += rest
        return given + rest

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _give(self, piece: str) -> str:
        """Return a piece of text without what may be, or is, a stop text."""
        whole = self._held + piece
        places = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            given = whole[: min(places)]
        else:
            num_held = max((_overlap(whole, stop) for stop in self.stops), default=0)
            given, self._held = whole[: len(whole) - num_held], whole[len(whole) - num_held :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Return the most characters at the end of `text` that `stop` begins with, less than all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@torch.no_grad()
def speak(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    state: FamState,
    max_new_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """Yield an answer as it is drawn; the state advances over the prompt and the answer.

    Afterwards `state.unread_ids` has the last token, which the next reading reads first; a token that ends the text is
    not among them. A stop text may be in the state in part.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        ids: the prompt, at least one token.
        state: a reading of one sequence.
        max_new_tokens: tokens at most.
        sampling: how tokens are drawn.
        stops: texts before which the answer ends.
    """
    ends = end_ids(tokenizer, model.generation_config.eos_token_id)
    read_last_tokens(model, state)
    sampler, stream = Sampler(sampling), TextStream(tokenizer, stops, ids)
    fresh = list(ids)
    for _ in range(max_new_tokens):
        ids_1T = torch.tensor([fresh], device=model.device)
        token = sampler.draw(model(input_ids=ids_1T, past_key_values=state, logits_to_keep=1).logits[0, -1])
        if token in ends:
            break
        state.unread_ids, fresh = [token], [token]
        if piece := stream.push(token):
            yield piece
        if stream.is_stopped:
            break
    if rest := stream.end():
        yield rest


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Yield a text without the white space around it."""
    held, has_begun = "", False
    for piece in pieces:
        whole = held + (piece if has_begun else piece.lstrip())
        given = whole.rstrip()
        held, has_begun = whole[len(given) :], has_begun or bool(given)
        if given:
            yield given
