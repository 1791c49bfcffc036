"""Stretches of long texts, each read as a document from its beginning, and the names in them that were seen before."""

import bisect
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.text import list_files, read_text, start_ids
from transformerfam.tasks.unknown_words import require_known, unknown_share

WORD = re.compile(r"\b[A-Z]\w{2,}")
"""What may be a name: a person, a place, a lemma."""


@dataclass(frozen=True)
class Document:
    """A stretch of a text.

    Attributes:
        source: its file, and the token in it that it begins with.
        ids_T: its tokens, the special ones with which the tokenizer begins texts in front.
        gap_T: for every token of a name that the document has named before, the tokens since; 0 elsewhere.
    """

    source: str
    ids_T: Tensor
    gap_T: Tensor


def digest_of_texts(path: str | Path) -> str:
    """Return a digest of a file, or of all files of a folder; files that have not changed are not read again.

    Raises:
        TransformerFamError: a file cannot be read, or is not UTF-8.
    """
    return _digest(tuple((str(file), *_version(file)) for file in list_files(path)))


def _version(file: str | Path) -> tuple[int, ...]:
    """Return size and time of a file; nothing of a novel of the package, which does not change."""
    try:
        status = Path(file).stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _digest(files: tuple[tuple[Any, ...], ...]) -> str:
    digest = hashlib.sha256()
    for file, *_ in files:
        digest.update(hashlib.sha256(read_text(file).encode()).digest())
    return digest.hexdigest()[:16]


def read_documents(path: str | Path, tokenizer: Any, num_documents: int, num_tokens: int) -> list[Document]:
    """Return stretches of a text, evenly spread over the files that are long enough, each from the start of a line.

    Stretches overlap where the files are shorter than all of them together.

    Args:
        path: UTF-8 text, a folder of them, or the name of a novel of the package.
        tokenizer: a fast one, which says where in the text its tokens are.
        num_documents: how many.
        num_tokens: tokens of each.

    Raises:
        TransformerFamError: a file cannot be read, none is long enough, or the tokenizer knows too little of them.
    """
    for name, value, least in (("num_documents", num_documents, 1), ("document_tokens", num_tokens, 2)):
        if value < least:
            raise TransformerFamError(f"{name} is {value}, required is at least {least}; change {name}")
    start = start_ids(tokenizer)
    num_own = num_tokens - len(start)
    texts = [_Text(file, tokenizer) for file in list_files(path)]
    places = [max(0, len(text.ids) - num_own + 1) for text in texts]
    if sum(places) < num_documents:
        raise TransformerFamError(
            f"the longest file of {path} has {max(len(text.ids) for text in texts):,} tokens, required are "
            f"{num_own + num_documents - 1:,} for {num_documents} documents of {num_tokens:,}; give longer texts, or "
            "fewer or shorter documents"
        )
    ids = [token for text, count in zip(texts, places, strict=True) if count for token in text.ids]
    require_known(unknown_share(tokenizer, ids), f"the text of {path}", "take another text")
    ends = list(itertools.accumulate(places))
    found = []
    for number in range(num_documents):
        place = (2 * number + 1) * ends[-1] // (2 * num_documents)
        idx = bisect.bisect_right(ends, place)
        found.append(texts[idx].stretch(place - (ends[idx] - places[idx]), num_own, start))
    return found


class _Text:
    """A file, its tokens, and the names in it."""

    def __init__(self, file: str | Path, tokenizer: Any) -> None:
        self.name = Path(file).name
        text = read_text(file)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.ids: list[int] = list(encoded["input_ids"])
        ends = [end for _, end in encoded["offset_mapping"]]  # a token with the space in front of a word ends in it
        self.lines = [0] + [bisect.bisect_right(ends, found.end()) for found in re.finditer(r"\n", text)]
        self.names = [
            (word, bisect.bisect_right(ends, begin), bisect.bisect_left(ends, end) + 1)
            for word, begin, end in names_in(text)
        ]

    def stretch(self, place: int, num_tokens: int, start: Sequence[int]) -> Document:
        """Return the tokens from the last line that begins at or before `place`."""
        first = self.lines[bisect.bisect_right(self.lines, place) - 1]
        gap_T = torch.zeros(len(start) + num_tokens, dtype=torch.long)
        last: dict[str, int] = {}
        for word, begin, end in self.names[bisect.bisect_left(self.names, first, key=lambda name: name[1]) :]:
            if end > first + num_tokens:
                break
            if word in last:
                gap_T[len(start) + begin - first : len(start) + end - first] = begin - last[word]
            last[word] = end
        ids = [*start, *self.ids[first : first + num_tokens]]
        return Document(f"{self.name}:{first}", torch.tensor(ids), gap_T)


def names_in(text: str) -> list[tuple[str, int, int]]:
    """Return the names of a text, in order, with the characters where each begins and ends.

    A name is a word of three letters or more with a capital that the text nowhere has in small letters.
    """
    small = set(re.findall(r"\b[a-z]\w*", text))
    return [
        (found.group(), found.start(), found.end())
        for found in WORD.finditer(text)
        if found.group().lower() not in small
    ]
