"""Passkey retrieval: the paper's text, and one reading per key, evaluated at every length."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.reports.telling import NUM_DIGITS, WORDING
from transformerfam.tasks.filler import FillerStream, load_filler
from transformerfam.tasks.text import encode, start_ids
from transformerfam.tasks.wordings import KEY, Wording

BEFORE_KEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there. The pass key is"
)
SHORT_BEFORE_KEY = " The pass key is"
BETWEEN_KEYS = ". Remember it."
AFTER_KEY = " is the pass key."
QUESTION = " What is the pass key? The pass key is"
PAPER = Wording(
    intro=f"{BEFORE_KEY} {KEY}{BETWEEN_KEYS} {KEY}{AFTER_KEY}",
    question=" What is the pass key?",
    answer=f" The pass key is {KEY}",
    name=WORDING,
)
"""The paper's wording (D.1)."""
SHORT = dataclasses.replace(PAPER, intro=PAPER.intro.replace(BEFORE_KEY, SHORT_BEFORE_KEY), name="short")
"""The paper's without the two sentences in front."""
FIRST_KEY, LAST_KEY = 10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS - 1


@dataclass(frozen=True)
class PasskeySequence:
    """One passkey text in four pieces of token ids, in the order in which they are read."""

    intro_ids: list[int]
    """The sentences that give the key, twice."""

    filler_ids: list[int]
    """The irrelevant text."""

    question_ids: list[int]
    """The question, up to the place where the key has to follow."""

    answer_ids: list[int]
    """The key, as the model has to answer it."""

    @property
    def ids(self) -> list[int]:
        """All four pieces in one list."""
        return self.intro_ids + self.filler_ids + self.question_ids + self.answer_ids


class PasskeyText:
    """Write passkey texts for one tokenizer: each constant piece is tokenised once, then ids are joined.

    Joining ids and not text makes every key and every length tokenise alike.
    """

    def __init__(
        self, tokenizer: Any, filler: str | Path | FillerStream = "sentences", wording: Wording = PAPER
    ) -> None:
        """Tokenise the constant pieces.

        Args:
            tokenizer: a Hugging Face tokenizer.
            filler: "sentences" (the paper's), the name of a held-out novel, a UTF-8 text file, or a stream of tokens.
            wording: how the key is given and queried.

        Raises:
            TransformerFamError: the tokenizer has no tokens for digits, or the file cannot be read.
        """
        self._tokenizer = tokenizer
        self.start_ids = start_ids(tokenizer)
        self.filler = filler if isinstance(filler, FillerStream) else load_filler(tokenizer, filler)
        self.wording = wording
        pieces = wording.intro.split(KEY)
        self._intro_pieces = [encode(tokenizer, piece.removesuffix(" ")) for piece in pieces[:-1]]
        self._intro_leads = [piece[len(piece.removesuffix(" ")) :] for piece in pieces[:-1]]
        self._intro_end = encode(tokenizer, pieces[-1])
        self.question_ids = encode(tokenizer, wording.asked)
        before_answer = wording.question + wording.answer.split(KEY)[0]
        self._answer_lead = before_answer[len(before_answer.removesuffix(" ")) :]
        unknown_id = getattr(tokenizer, "unk_token_id", None)
        if unknown_id is not None and unknown_id in self.key_ids(1234567890):
            raise TransformerFamError(
                "the tokenizer has no tokens for the digits of a passkey, all ten are required; "
                "use a model whose vocabulary holds digits"
            )

    @property
    def wording_ids(self) -> list[int]:
        """The tokens of the wording, without keys."""
        return [*itertools.chain(*self._intro_pieces), *self._intro_end, *self.question_ids]

    @functools.cached_property
    def _digit_ids(self) -> tuple[list[int], list[int]] | None:
        """The tokens in front of a key and the token of each digit; None if the tokenizer joins digits."""
        lead_ids = encode(self._tokenizer, " 1234567890")
        lead_ids, ids = lead_ids[:-10], lead_ids[-10:]
        by_digit = [ids[-1], *ids[:-1]] if len(ids) == 10 else []
        for probe in (10_000, 99_999, 54_321, 67_890):
            if encode(self._tokenizer, f" {probe}") != lead_ids + [by_digit[int(d)] for d in str(probe) if by_digit]:
                return None
        return lead_ids, by_digit

    def _number_ids(self, key: int, lead: str) -> list[int]:
        """Return the tokens of a key after `lead`, a space or nothing."""
        if lead != " " or self._digit_ids is None:
            return encode(self._tokenizer, f"{lead}{key}")
        lead_ids, by_digit = self._digit_ids
        return lead_ids + [by_digit[int(digit)] for digit in str(key)]

    def key_ids(self, key: int) -> list[int]:
        """Return the tokens of a key in the answer: those of " <key>" after a space."""
        return self._number_ids(key, self._answer_lead)

    def _intro(self, key: int) -> tuple[list[int], list[int]]:
        """Return the sentences that give a key, and the places of its tokens in them."""
        ids: list[int] = []
        places: list[int] = []
        for piece, lead in zip(self._intro_pieces, self._intro_leads, strict=True):
            ids += piece
            key_ids = self._number_ids(key, lead)
            places += range(len(ids), len(ids) + len(key_ids))
            ids += key_ids
        return ids + self._intro_end, places

    def intro_ids(self, key: int) -> list[int]:
        """Return the sentences that give the key."""
        return self._intro(key)[0]

    def key_places(self, key: int) -> list[int]:
        """Return where in `intro_ids` the tokens of the key are, for every mention."""
        return self._intro(key)[1]

    def decode(self, ids: list[int]) -> str:
        """Return a model's answer as text, without surrounding space."""
        return str(self._tokenizer.decode(ids)).strip()

    def sequence(self, key: int, num_filler_tokens: int, filler_start: int = 0) -> PasskeySequence:
        """Write the text of one key.

        Args:
            key: five-digit key.
            num_filler_tokens: tokens of filler between the intro and the question.
            filler_start: first token of the filler that is used.
        """
        return PasskeySequence(
            intro_ids=self.start_ids + self.intro_ids(key),
            filler_ids=self.filler.slice(filler_start, num_filler_tokens).tolist(),
            question_ids=list(self.question_ids),
            answer_ids=self.key_ids(key),
        )

    def batch(self, keys: Sequence[int], num_filler_tokens: int, filler_starts: Tensor | None = None) -> Tensor:
        """Write one rectangular training batch without calling the tokenizer.

        The answer is the last `len(key_ids(key))` tokens of each row.

        Args:
            keys: one key per row.
            num_filler_tokens: tokens of filler, the same in every row.
            filler_starts: (B,) first token of filler in each row; None is zero.

        Returns:
            (B, T) token ids.

        Raises:
            TransformerFamError: the keys have different numbers of tokens, so that the rows are no rectangle.
        """
        starts = torch.zeros(len(keys), dtype=torch.long) if filler_starts is None else filler_starts
        filler_BT = self.filler.rows(starts, num_filler_tokens)
        intros = [self.start_ids + self.intro_ids(key) for key in keys]
        tails = [self.question_ids + self.key_ids(key) for key in keys]
        if len({len(ids) for ids in tails}) > 1:
            raise TransformerFamError(
                f"keys take {sorted({len(self.key_ids(key)) for key in keys})} tokens, one number is required in a "
                "batch; use a tokenizer that gives every digit its own token"
            )
        return torch.cat([torch.tensor(intros), filler_BT, torch.tensor(tails)], dim=1)


def build_passkey(
    tokenizer: Any,
    key: int,
    filler: FillerStream,
    num_filler_tokens: int,
    filler_start: int = 0,
) -> PasskeySequence:
    """Write the passkey text of one key; `PasskeyText` does it faster for many.

    Args:
        tokenizer: a Hugging Face tokenizer.
        key: five-digit key.
        filler: the irrelevant text.
        num_filler_tokens: tokens of filler between the intro and the question.
        filler_start: first token of the filler that is used.

    Source: sections 3.2 and D.1.
    """
    return PasskeyText(tokenizer, filler).sequence(key, num_filler_tokens, filler_start)


def draw_keys(num_keys: int, seed: int, num_digits: int = NUM_DIGITS) -> list[int]:
    """Draw different keys; the first keys of a longer draw are those of a shorter one.

    Raises:
        TransformerFamError: `num_digits` is not 1 to 9, or there are not so many keys.
    """
    if not 1 <= num_digits <= 9:
        raise TransformerFamError(f"num_digits is {num_digits}, required is 1 to 9; change num_digits")
    first = 10 ** (num_digits - 1)
    num_possible = 9 * first
    if not 1 <= num_keys <= num_possible:
        raise TransformerFamError(
            f"num_keys is {num_keys}, required is 1 to {num_possible}, the keys of {num_digits} digits; change num_keys"
        )
    generator = torch.Generator().manual_seed(seed)
    if num_digits <= 6:
        return (first + torch.randperm(num_possible, generator=generator)[:num_keys]).tolist()
    drawn: dict[int, None] = {}
    while len(drawn) < num_keys:  # no list of a billion keys
        drawn[first + int(torch.randint(num_possible, (), generator=generator))] = None
    return list(drawn)
