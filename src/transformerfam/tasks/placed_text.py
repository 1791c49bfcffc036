"""Filler of any length with sentences at given places, served in slices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transformerfam.tasks.filler import FillerStream


class PlacedText:
    """Filler with some sentences in it.

    Args:
        filler: the filler.
        start: its first token that is used.
        sentences: for each the tokens of filler in front of it, and its own tokens.
    """

    def __init__(self, filler: FillerStream, start: int, sentences: Sequence[tuple[int, list[int]]]) -> None:
        self.filler, self.start = filler, start
        self.sentences = sorted(sentences, key=lambda placed: placed[0])

    def length(self, num_filler_tokens: int) -> int:
        """Return the tokens of the text up to so many tokens of filler, all sentences at that place included."""
        told = sum(len(ids) for place, ids in self.sentences if place <= num_filler_tokens)
        return num_filler_tokens + told

    def slice(self, begin: int, end: int) -> Tensor:
        """Return the tokens `begin` to `end` of the text, shape (end - begin,)."""
        parts, place, filled = [], 0, 0  # place in the text, and in the filler
        for at, ids in [*self.sentences, (end, [])]:
            low, high = max(begin, place), min(end, place + at - filled)
            if low < high:
                parts.append(self.filler.slice(self.start + filled + low - place, high - low))
            place, filled = place + at - filled, at
            low, high = max(begin, place), min(end, place + len(ids))
            if low < high:
                parts.append(torch.tensor(ids[low - place : high - place]))
            place += len(ids)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
