"""Passkey retrieval: the paper's text, and one reading per key that is asked at every length."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.reports.telling import NUM_DIGITS, WORDING
from transformerfam.tasks.text import encode, read_text, start_ids
from transformerfam.tasks.wordings import KEY, Wording

BEFORE_KEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there. The pass key is"
)
SHORT_BEFORE_KEY = " The pass key is"
BETWEEN_KEYS = ". Remember it."
AFTER_KEY = " is the pass key."
FILLER_SENTENCES = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = " What is the pass key? The pass key is"
PARAGRAPH_TOKENS = 64
"""Tokens of a paragraph where a text has none."""
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
    """The sentences that tell the key, twice."""

    filler_ids: list[int]
    """The irrelevant text."""

    question_ids: list[int]
    """The question, up to the place where the key has to follow."""

    answer_ids: list[int]
    """The key, as the model has to say it."""

    @property
    def ids(self) -> list[int]:
        """All four pieces in one list."""
        return self.intro_ids + self.filler_ids + self.question_ids + self.answer_ids


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
        """What tells its text from another of the same name."""
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
            wording: how the key is told and asked for.

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
        """Return the tokens of a key behind `lead`, a space or nothing."""
        if lead != " " or self._digit_ids is None:
            return encode(self._tokenizer, f"{lead}{key}")
        lead_ids, by_digit = self._digit_ids
        return lead_ids + [by_digit[int(digit)] for digit in str(key)]

    def key_ids(self, key: int) -> list[int]:
        """Return the tokens of a key in the answer: those of " <key>" after a space."""
        return self._number_ids(key, self._answer_lead)

    def _intro(self, key: int) -> tuple[list[int], list[int]]:
        """Return the sentences that tell a key, and where in them its tokens stand."""
        ids: list[int] = []
        places: list[int] = []
        for piece, lead in zip(self._intro_pieces, self._intro_leads, strict=True):
            ids += piece
            key_ids = self._number_ids(key, lead)
            places += range(len(ids), len(ids) + len(key_ids))
            ids += key_ids
        return ids + self._intro_end, places

    def intro_ids(self, key: int) -> list[int]:
        """Return the sentences that tell the key."""
        return self._intro(key)[0]

    def key_places(self, key: int) -> list[int]:
        """Return where in `intro_ids` the tokens of the key stand, every time that it is told."""
        return self._intro(key)[1]

    def decode(self, ids: list[int]) -> str:
        """Return what a model said as text, without space around it."""
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
