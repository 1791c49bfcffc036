"""A text that is studied: its tokens, and the pieces of them that lessons are about."""

import random
import re
from dataclasses import dataclass

import torch

from transformerfam.errors import TransformerFamError

SENTENCE = re.compile(
    r"[^\W\d_]\W{1,3}[^\W\d_]+[\"'\u201d\u2019)\]]*[.!?\u2026](?!\w)|[^\W\d_]{2}[\u3002\uff01\uff1f]|\w\s+\w+\s*\u0964"
)
"""The end of a sentence: two words, then what ends one; in scripts without spaces, two characters."""


def require_sentences(text: str, name: str) -> None:
    """Refuse a text without a sentence: there is nothing to ask and to answer about it.

    Raises:
        TransformerFamError: it has none.
    """
    if SENTENCE.search(text) is None:
        raise TransformerFamError(
            f"{name} has no sentence (words that end with '.', '!' or '?'), and a study asks about what sentences say; "
            "give a text of sentences, or read it with `fam read`"
        )


@dataclass(frozen=True)
class Pieces:
    """The pieces of a text: as many tokens each, one after the other; the last ends with the text.

    Raises:
        TransformerFamError: the text has fewer tokens than a piece.
    """

    ids_T: torch.Tensor
    num_tokens: int

    def __post_init__(self) -> None:
        if len(self.ids_T) < self.num_tokens:
            raise TransformerFamError(
                f"the text has {len(self.ids_T)} tokens, required are at least those of a piece, {self.num_tokens}; "
                "give a longer text, or smaller pieces"
            )

    def starts(self, held_out: bool = False) -> list[int]:
        """Return where pieces begin; those held out begin in the middle of the others."""
        last = len(self.ids_T) - self.num_tokens
        first = self.num_tokens // 2 if held_out else 0
        starts = [start for start in range(first, last, self.num_tokens) if start < last]
        return [*starts, last] if not held_out or not starts else starts

    def draw(self, draw: random.Random, count: int, held_out: bool = False) -> torch.Tensor:
        """Return pieces `(count, num_tokens)`, different ones as long as there are."""
        starts = self.starts(held_out)
        chosen: list[int] = []
        while len(chosen) < count:
            chosen += draw.sample(starts, min(len(starts), count - len(chosen)))
        return torch.stack([self.ids_T[start : start + self.num_tokens] for start in chosen])
