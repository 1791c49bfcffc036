"""The next token, drawn from a model's logits: the likeliest, or one by temperature and nucleus."""

import dataclasses
import math

import torch
from torch import Tensor

from transformerfam.errors import TransformerFamError

LARGEST_TEMPERATURE = 100.0
LARGEST_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: share of probability that the likeliest tokens must reach together; others are not drawn.
        seed: of the draws, for the same answer again; None draws another each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            TransformerFamError: one is; the message names it.
        """
        for name, value, fits, required in (
            ("temperature", self.temperature, 0 <= self.temperature <= LARGEST_TEMPERATURE, "0 to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed, self.seed is None or abs(self.seed) <= LARGEST_SEED, "an integer below 2^63"),
        ):
            if not fits:
                raise TransformerFamError(f"{name} is {value!r}, required is {required}; change {name}")


class Sampler:
    """Draw the tokens of one answer.

    Args:
        sampling: how.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits_V: Tensor) -> int:
        """Return the next token.

        Args:
            logits_V: of all tokens, of any type and device.

        Raises:
            TransformerFamError: no logit is a number.
        """
        logits_V = logits_V.float().cpu()
        if not bool(logits_V.isfinite().any()) or bool(logits_V.isnan().any()):
            raise TransformerFamError(
                "the logits are not numbers, so no token can be drawn; look for values out of range in the weights or "
                "the memory, or load the model in float32"
            )
        if self.sampling.temperature == 0:
            return int(logits_V.argmax())
        share_V = torch.softmax(logits_V / self.sampling.temperature, dim=0)
        if not bool(share_V.isfinite().all()):  # a temperature next to 0
            return int(logits_V.argmax())
        if self.sampling.top_p < 1:
            sorted_V, order_V = share_V.sort(descending=True)
            is_rest = sorted_V.cumsum(0) - sorted_V >= self.sampling.top_p
            share_V = share_V.index_fill(0, order_V[is_rest], 0.0)
        return int(torch.multinomial(share_V, 1, generator=self._generator))


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities for one drawn token, before temperature and nucleus.

    Attributes:
        token: its id.
        logprob: its own.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def of(cls, logits_V: Tensor, token: int, num_top: int) -> "TokenLogprobs":
        """Return those of a token among logits `(V,)`; `num_top` may be 0."""
        logprob_V = torch.log_softmax(logits_V.float().cpu(), dim=0)
        values, ids = logprob_V.topk(min(num_top, len(logprob_V)))
        top = [(int(i), _finite(float(v))) for i, v in zip(ids, values, strict=True)]
        return cls(token, _finite(float(logprob_V[token])), top)


def _finite(value: float) -> float:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else -9999.0
