"""How much of a text is in others, word by word: a test text that was trained on measures nothing."""

import re
from collections.abc import Iterable

import numpy as np

LENGTH = 13
"""Words of a shingle."""
WORD = re.compile(r"\w+")
PRIME = np.uint64(0x9E3779B97F4A7C15)


class Shingles:
    """All runs of 13 words of some texts, without case and punctuation.

    Args:
        texts: any number of texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._words: dict[str, int] = {}
        found = [self._of(text) for text in texts]
        self._hashes = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)

    def __len__(self) -> int:
        """Return how many different ones there are."""
        return len(self._hashes)

    def share_of(self, text: str) -> float:
        """Return the share of a text's shingles that are among these; 0 for a text of fewer words."""
        own = self._of(text)
        if not len(own) or not len(self._hashes):
            return 0.0
        nearest = np.searchsorted(self._hashes, own).clip(max=len(self._hashes) - 1)
        return float((self._hashes[nearest] == own).mean())

    def _of(self, text: str) -> np.ndarray:
        """Return the hashes of a text's shingles in their order, as [number] of uint64."""
        words = [self._words.setdefault(word, len(self._words) + 1) for word in WORD.findall(text.lower())]
        ids = np.array(words, np.uint64)
        if len(ids) < LENGTH:
            return np.empty(0, np.uint64)
        ids = (ids ^ (ids >> np.uint64(3))) * PRIME  # neighbours in the list of words differ in all bits
        hashes = np.zeros(len(ids) - LENGTH + 1, np.uint64)
        for idx in range(LENGTH):
            hashes = hashes * PRIME + ids[idx : idx + len(hashes)]
        return hashes
