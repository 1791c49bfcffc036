"""Tokens as text while they are drawn: characters that are whole, and nothing from a stop text on."""

from collections.abc import Sequence
from typing import Any

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
