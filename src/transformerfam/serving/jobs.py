"""What the engine works on: answers that are generated and texts that are read."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from torch import Tensor

from transformerfam.fam.state import FamState
from transformerfam.tasks.sampling import Sampler, TokenLogprobs


class TokenSource(Protocol):
    """Token ids of a text that may still be arriving."""

    def take(self, num_tokens: int) -> list[int] | None:
        """Return at most so many ids; [] where none are there yet, None after the last.

        Raises:
            TransformerFamError: the text is not what can be read.
        """


class Job:
    """Work on one state.

    Args:
        state: of one sequence; it is the engine's until the job is done.

    Attributes:
        on_done: called by the engine's thread once, with the error that ended the job or None.
        is_cancelled: whether nobody waits for it; the engine drops it at its next step.
    """

    def __init__(self, state: FamState) -> None:
        self.state = state
        self.on_done: Callable[[BaseException | None], None] = lambda error: None
        self.is_cancelled = False


class Reading(Job):
    """A text that is read into a state.

    Args:
        state: see `Job`.
        source: the text's ids.
        on_progress: called with the tokens read so far, by the engine's thread.
    """

    def __init__(
        self, state: FamState, source: TokenSource, on_progress: Callable[[int], None] = lambda num_tokens: None
    ) -> None:
        super().__init__(state)
        self.source = source
        self.on_progress = on_progress
        self.num_tokens = 0

    def read(self, model: Any, ids_1T: Tensor) -> None:
        """Read a slice into the state; by the engine's thread.

        Args:
            model: that reads.
            ids_1T: `(1, T)` token ids, no more than the state's block takes.
        """
        model.read(ids_1T, self.state)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token of an answer.

    Attributes:
        token: its id.
        logprobs: of it and of the likeliest ones, where they are wanted.
    """

    token: int
    logprobs: TokenLogprobs | None


class Generation(Job):
    """An answer that is generated after a prompt.

    Args:
        state: see `Job`; afterwards it holds the prompt and the answer, without the token that ended it.
        prompt: ids that are read first, at least one.
        sampler: draws the tokens.
        max_tokens: tokens at most.
        end_ids: tokens that end it, which are no part of it.
        num_top_logprobs: likeliest tokens that are named with each; None: no logprobs.
        on_token: takes each token, by the engine's thread; True ends the answer (a stop text).
        keeps_start: whether a copy of the state in front of the answer is kept, as `start`.

    Attributes:
        finish_reason: "stop" or "length", once it is done.
        num_tokens: tokens of the answer so far, the one that ends it included.
    """

    def __init__(
        self,
        state: FamState,
        prompt: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        end_ids: Collection[int],
        *,
        num_top_logprobs: int | None = None,
        on_token: Callable[[Drawn], bool] = lambda drawn: False,
        keeps_start: bool = False,
    ) -> None:
        super().__init__(state)
        self.prompt = list(prompt)
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.end_ids = frozenset(end_ids)
        self.num_top_logprobs = num_top_logprobs
        self.on_token = on_token
        self.keeps_start = keeps_start
        self.start: FamState | None = None
        self.num_read = 0  # of the prompt
        self.num_tokens = 0
        self.last_token: int | None = None
        self.finish_reason: str | None = None

    def accept(self, logits_V: Tensor) -> bool:
        """Draw the next token, hand it on, and return whether the answer is complete."""
        token = self.sampler.draw(logits_V)
        self.num_tokens += 1
        if token in self.end_ids:
            self.last_token, self.finish_reason = None, "stop"
            return True
        self.last_token = token
        top = self.num_top_logprobs
        logprobs = None if top is None else TokenLogprobs.of(logits_V, token, top)
        if self.on_token(Drawn(token, logprobs)):
            self.finish_reason = "stop"
        elif self.num_tokens >= self.max_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def note_unread(self) -> None:
        """Let the state know the answer's last token, which the next reading reads first."""
        state: Any = self.state
        state.unread_ids = [self.last_token]
