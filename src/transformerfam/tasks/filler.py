"""Irrelevant text of any length: the paper's sentences, a novel, or a file, repeated without end."""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.text import encode, read_text

FILLER_SENTENCES = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PARAGRAPH_TOKENS = 64
"""Tokens of a paragraph where a text has none."""


class FillerStream:
    """Irrelevant text of any length, served in slices from a few tokens that repeat without end."""

    def __init__(self, ids: Sequence[int] | Tensor, name: str, digest: str | None = None) -> None:
        """Keep `ids`, one period of the filler.

        Args:
            ids: token ids, at least one.
            name: what the rows call this filler, "sentences" or the name of a file.
            digest: that of its text; None takes one of the ids.

        Raises:
            TransformerFamError: `ids` is empty.
        """
        self.period_T = torch.as_tensor(ids, dtype=torch.long)
        self.name = name
        self.digest = digest or text_digest(str(self.period_T.tolist()))
        """What distinguishes its text from another of the same name."""
        if self.period_T.numel() == 0:
            raise TransformerFamError(f"filler {name!r} has 0 tokens, at least 1 is required; give a text with words")

    def __len__(self) -> int:
        """Return the number of tokens after which the filler repeats."""
        return self.period_T.numel()

    def slice(self, start: int, length: int) -> Tensor:
        """Return the tokens `start` to `start + length` of the endless filler, shape (length,)."""
        return self.period_T[(start + torch.arange(length)) % len(self)]

    def rows(self, starts: Tensor, length: int) -> Tensor:
        """Return one slice of `length` tokens per start; `starts` has shape (B,), the result (B, length)."""
        return self.period_T[(starts[:, None] + torch.arange(length)) % len(self)]

    def rows_in_pieces(self, starts: Tensor, length: int, num_tokens: int) -> Iterator[Tensor]:
        """Yield what `rows` returns, `num_tokens` of it at a time, for `model.read`."""
        for begin in range(0, length, num_tokens):
            yield self.rows(starts + begin, min(num_tokens, length - begin))


class ShuffledStream(FillerStream):
    """A filler that repeats with its paragraphs in another order, so that no text is read twice."""

    def __init__(self, ids: Sequence[int] | Tensor, name: str, ends: Sequence[int], digest: str | None = None) -> None:
        """Keep the filler and its paragraphs.

        Args:
            ids: token ids, at least one.
            name: as for `FillerStream`.
            ends: one past the last token of every paragraph, in order.
            digest: as for `FillerStream`.

        Raises:
            TransformerFamError: `ids` is empty.
        """
        super().__init__(ids, name, digest)
        bounds = [0, *ends, len(self)]
        self._paragraphs = [self.period_T[a:b] for a, b in itertools.pairwise(bounds) if a < b]
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)  # of the last repetitions

    def _shuffled(self, repetition: int) -> Tensor:
        """Return one period in its order for a repetition; 0 is the text as it was written."""
        if repetition == 0:
            return self.period_T
        order = torch.randperm(len(self._paragraphs), generator=torch.Generator().manual_seed(repetition % (1 << 62)))
        return torch.cat([self._paragraphs[i] for i in order.tolist()])

    def slice(self, start: int, length: int) -> Tensor:
        """Return the tokens `start` to `start + length` of the endless filler, shape (length,)."""
        parts, stop = [], start + length
        while start < stop:
            repetition, place = divmod(start, len(self))
            part = self._order(repetition)[place : place + stop - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts) if parts else self.period_T[:0]

    def rows(self, starts: Tensor, length: int) -> Tensor:
        """Return one slice of `length` tokens per start; `starts` has shape (B,), the result (B, length)."""
        return torch.stack([self.slice(int(start), length) for start in starts])


def load_filler(tokenizer: Any, filler: str | Path, text: str | None = None) -> FillerStream:
    """Tokenise the paper's sentences ("sentences"), a novel of the package by its name, or a UTF-8 text file, once.

    Args:
        tokenizer: a Hugging Face tokenizer.
        filler: its name.
        text: what `filler_text` returned for it, if it was read already: a pipe can be read once.

    Raises:
        TransformerFamError: the file is missing, empty or not UTF-8.
    """
    text = filler_text(filler) if text is None else text
    return FillerStream(encode(tokenizer, text), Path(filler).name, text_digest(text))


def filler_text(filler: str | Path) -> str:
    """Return the text of a filler: the paper's sentences ("sentences"), a novel of the package, or a UTF-8 file.

    Raises:
        TransformerFamError: the file is missing or not UTF-8.
    """
    return FILLER_SENTENCES if str(filler) == "sentences" else read_text(filler)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def load_shuffled(tokenizer: Any, filler: str | Path, text: str | None = None) -> FillerStream:
    """Tokenise a filler as `load_filler` does; paragraphs of a text come in another order when it repeats."""
    stream = load_filler(tokenizer, filler, text)
    if stream.name == "sentences":
        return stream
    ids = stream.period_T.tolist()
    num_newlines = {token: str(tokenizer.decode([token])).count("\n") for token in set(ids)}
    ends, run = [], 0
    for place, token in enumerate(ids):
        if run >= 2 and num_newlines[token] == 0:
            ends.append(place)
        run = run + num_newlines[token] if num_newlines[token] else 0
    if not ends:  # one paragraph, or a tokenizer that knows no line breaks
        ends = list(range(PARAGRAPH_TOKENS, len(ids), PARAGRAPH_TOKENS))
    return ShuffledStream(ids, stream.name, ends, stream.digest)
