"""Passages of a text that match a question, by BM25: what a memory is compared with."""

import re
from typing import Any

import torch
from torch import Tensor

from transformerfam.errors import MissingPackageError

PASSAGE_TOKENS = 64
"""Of what is retrieved."""


def retrieve(tokenizer: Any, ids: Tensor, question: str, num_tokens: int) -> Tensor:
    """Return the passages of a text that match a question best by BM25, in the text's order.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the text, `(T,)`.
        question: what is looked for.
        num_tokens: of all passages together, at most.

    Raises:
        MissingPackageError: rank-bm25 is not installed.
    """
    index = bm25_index()
    if num_tokens < 1 or not len(ids):
        return ids[:0]
    passages = list(ids.split(min(PASSAGE_TOKENS, num_tokens)))
    words = [_words(str(tokenizer.decode(passage))) for passage in passages]
    scores = index(words).get_scores(_words(question)).tolist() if any(words) else [0.0] * len(words)
    chosen, left = [], num_tokens
    for idx in sorted(range(len(passages)), key=lambda idx: -scores[idx]):
        if len(passages[idx]) <= left:
            chosen.append(idx)
            left -= len(passages[idx])
    return torch.cat([passages[idx] for idx in sorted(chosen)])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25_index() -> Any:
    """Return rank-bm25's index; BM25+ is the form whose weights stay above 0 where most passages have a word.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from rank_bm25 import BM25Plus
    except ImportError as error:
        raise MissingPackageError(
            'rank-bm25 is needed for system bm25; pip install "transformerfam[answers]"'
        ) from error
    return BM25Plus
