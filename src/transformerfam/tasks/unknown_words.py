"""Words that a tokenizer does not know: how many a text has, and when it is refused or warned of."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformerfam.errors import TransformerFamError

MOST_UNKNOWN = 0.6
"""Largest share of a text's tokens that may be unknown words by default: above it hardly a sentence
differs from another."""
SOME_UNKNOWN = 0.01
"""Share of them from which on a warning says so."""


def unknown_share(tokenizer: Any, ids: Sequence[int]) -> float:
    """Return the share of token ids that are words that the tokenizer does not know."""
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    return 0.0 if unknown_id is None or not ids else list(ids).count(unknown_id) / len(ids)


def require_known(share: float, what: str, remedy: str) -> None:
    """Refuse a text of which the tokenizer knows too little.

    Args:
        share: of its tokens that are unknown words.
        what: name of the text.
        remedy: how to read it all the same.

    Raises:
        TransformerFamError: the share is above `MOST_UNKNOWN`.
    """
    if share > MOST_UNKNOWN:
        raise TransformerFamError(
            f"{share:.0%} of the tokens of {what} are words that the tokenizer does not know, allowed are "
            f"{MOST_UNKNOWN:.0%}; take a model whose vocabulary has them, or {remedy}"
        )


def warn_unknown(share: float, what: str) -> None:
    """Warn of a text of which the tokenizer does not know some words; `share` is that of its tokens."""
    if share >= SOME_UNKNOWN:
        warnings.warn(
            f"{share:.1%} of {what}'s tokens are words that the tokenizer does not know, which all read alike",
            stacklevel=3,
        )


def known_pieces(
    pieces: Iterable[list[int]], tokenizer: Any, what: str, remedy: str, *, allow_unknown: bool = False
) -> Iterator[list[int]]:
    """Yield the pieces of a text; warn of the first later piece that is mostly unknown, and of all after the last one.

    The first word does not count: without a space in front, a tokenizer of whole words does not know it.

    Raises:
        TransformerFamError: at the first piece, the tokenizer knows too little of it, and `allow_unknown` is False.
    """
    num_read, num_unknown, is_said = 0, 0.0, allow_unknown
    for ids in pieces:
        share = unknown_share(tokenizer, ids[1:] if num_read == 0 else ids)
        if num_read == 0 and not allow_unknown:
            require_known(share, what, remedy)
        elif share > MOST_UNKNOWN and not is_said:
            is_said = True
            place = f"of the tokens {num_read:,} to {num_read + len(ids):,} of {what}"
            warnings.warn(f"{share:.0%} {place} are words that the tokenizer does not know", stacklevel=3)
        num_read, num_unknown = num_read + len(ids), num_unknown + share * len(ids)
        yield ids
    warn_unknown(num_unknown / max(1, num_read), what)


def say_unknown(tokenizer: Any, ids: Sequence[int], what: str) -> None:
    """Warn of a short text with unknown words, as of a question or a prompt; the first word counts where it is alone.

    Args:
        tokenizer: of the model.
        ids: tokens of the text.
        what: name of the text.
    """
    warn_unknown(unknown_share(tokenizer, ids[1:] or ids), what)


def require_wording(tokenizer: Any, ids: Sequence[int], name: str) -> None:
    """Refuse a wording of which the tokenizer knows too little; warn of one that it does not know fully.

    Raises:
        TransformerFamError: the share of unknown words is above `MOST_UNKNOWN`.
    """
    share = unknown_share(tokenizer, ids[1:] or ids)
    require_known(share, f"the wording {name}", "another wording")
    warn_unknown(share, f"the wording {name}")


def require_filler(tokenizer: Any, stream: Any) -> None:
    """Refuse a filler of which the tokenizer knows too little; warn of one that it does not know fully.

    Raises:
        TransformerFamError: the share of unknown words is above `MOST_UNKNOWN`.
    """
    share = unknown_share(tokenizer, stream.period_T.tolist())
    require_known(share, f"the filler {stream.name}", "another filler")
    warn_unknown(share, f"the filler {stream.name}")
