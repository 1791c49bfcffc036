"""Training on passkeys: a key in the paper's sentences, its filler, and the question for it."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import model_validator

from transformerfam.tasks.batch import Held, Row, Written
from transformerfam.tasks.named_keys import draw_key
from transformerfam.tasks.passkey import PAPER, SHORT, PasskeyText
from transformerfam.tasks.ranges import NotNegative, Share
from transformerfam.tasks.section import require
from transformerfam.tasks.writing import KeySection, Writer, load_books


class PasskeySection(KeySection):
    """The paper's passkey. Shares of the kinds of sequence are drawn row by row and need not sum to one."""

    can_be_taught: ClassVar[bool] = True
    can_be_stored: ClassVar[bool] = True
    can_be_cut: ClassVar[bool] = True
    fixed_keys: ClassVar[tuple[str, ...]] = (*KeySection.fixed_keys, "books", "short_intro")
    folder_keys: ClassVar[tuple[str, ...]] = ("books",)

    task: Literal["passkey"] = "passkey"
    """One key without a name, as in the paper."""
    passkey_sentences: NotNegative = 1.0
    """Passkey in the paper's sentences."""
    passkey_book: NotNegative = 0.0
    """Passkey in book text."""
    book: NotNegative = 0.0
    """Book text without a key."""
    books: str | None = None
    """Folder of UTF-8 `.txt` files; all are used."""
    short_intro: bool = False
    """Give the key without the two sentences in front, so that a step of the same cost has more keys: for the first
    part of a training."""
    boundary_share: Share = 0.0
    """Share of the steps in which a block boundary splits question and answer, where the filler's range allows it. Only
    FAM can then carry into the second block that there was a question."""

    @model_validator(mode="after")
    def _require_sources(self) -> Self:
        require(
            self.books is not None or self.passkey_book == self.book == 0,
            "data.passkey_book or data.book is above 0, required is a folder of .txt files; set data.books",
        )
        require(
            any((self.passkey_sentences, self.passkey_book, self.book)),
            "data.passkey_sentences, data.passkey_book and data.book are 0, required is one above 0",
        )
        return self


class PasskeyWriter(Writer[PasskeySection]):
    """Give a key, in the sentences of the paper or in a book, and query it; see `Writer`."""

    def __init__(self, section: PasskeySection, tokenizer: Any, seed: int, ask_later: float) -> None:
        """Tokenise the fillers; arguments and errors are those of `Writer`."""
        super().__init__(section, tokenizer, seed, ask_later)
        book = load_books(tokenizer, section.books) if section.books else None
        wording = SHORT if section.short_intro else PAPER
        self.text = PasskeyText(tokenizer, wording=wording)
        in_book = PasskeyText(tokenizer, book, wording) if book else self.text
        self.texts = {"passkey_sentences": self.text, "passkey_book": in_book, "book": in_book}
        self.filler, self.wording_ids = self.text.filler, self.text.wording_ids
        self.read = [book] if book else []

    def rows(
        self, draw: random.Random, step: int, num_filler: int, section: PasskeySection, carried: Sequence[Held | None]
    ) -> Written:
        """Write the rows of a step; see `Writer.rows`."""
        place, num_digits = self._told_place(step, section), self._num_digits(step, section)
        rows = [self._row(draw, num_filler, section, place, num_digits, key) for key in carried]
        return Written(rows, len(rows[0].ids) - max(row.num_asked_tokens for row in rows), place)

    def draw_filler(
        self, draw: random.Random, step: int, limits: tuple[int, int], section: PasskeySection, block_size: int
    ) -> int:
        """Draw the number of filler tokens, in a share of the steps among those that part the question."""
        num_filler = super().draw_filler(draw, step, limits, section, block_size)
        boundary = random.Random(f"{self.seed}/{step}/boundary")
        if section.boundary_share == 0 or boundary.random() >= section.boundary_share:
            return num_filler
        num_told, num_asked = self._told_place(step, section).stop, self._num_asked(self._num_digits(step, section))
        parting = [
            number for number in range(limits[0], limits[1] + 1) if 0 < -(num_told + number) % block_size < num_asked
        ]
        return boundary.choice(parting) if parting else num_filler

    def num_asked_tokens(self, section: PasskeySection) -> int:
        """Return the tokens of the question and the longest key."""
        return self._num_asked(section.key_digits[1])

    def _told_place(self, step: int, section: PasskeySection) -> slice:
        """Return the tokens of the sentences that give the key."""
        num_prefix = random.Random(f"{self.seed}/{step}/prefix").randint(*section.prefix_tokens)
        num_intro = len(self.text.intro_ids(10 ** (self._num_digits(step, section) - 1)))
        return slice(num_prefix, num_prefix + num_intro)

    def teacher_rows(self, rows: Sequence[Row], step: int, limits: tuple[int, int]) -> list[list[int]]:
        """Return the key's text with little filler: shorter keys get more, so that all have one length."""
        num_filler = random.Random(f"{self.seed}/{step}/teacher").randint(*limits)
        keys = [row.key for row in rows if row.key is not None]
        lengths = [len(self.text.sequence(key, 0).ids) for key in keys]
        longest = num_filler + max(lengths)
        return [self.text.sequence(key, longest - length).ids for key, length in zip(keys, lengths, strict=True)]

    def filler_rows(self, draw: random.Random, num_rows: int, num_tokens: int) -> torch.Tensor:
        """Return filler of the recipe's kinds; see `Writer.filler_rows`."""
        kinds: tuple[str, ...] = ("passkey_sentences", "passkey_book")
        if not any(getattr(self.section, name) for name in kinds):
            kinds = ("book",)
        chosen = draw.choices(kinds, [getattr(self.section, name) for name in kinds], k=num_rows)
        return torch.stack([self.texts[kind].filler.slice(draw.randrange(1 << 30), num_tokens) for kind in chosen])

    def _num_digits(self, step: int, section: PasskeySection) -> int:
        return random.Random(f"{self.seed}/{step}/digits").randint(*section.key_digits)

    def _num_asked(self, num_digits: int) -> int:
        """Return the tokens of the question and a key of so many digits."""
        return len(self.text.question_ids) + len(self.text.key_ids(10 ** (num_digits - 1)))

    def _row(
        self,
        draw: random.Random,
        num_filler: int,
        section: PasskeySection,
        told_place: slice,
        num_digits: int,
        carried_key: Held | None,
    ) -> Row:
        kinds = ("passkey_sentences", "passkey_book", "book")
        kind = draw.choices(kinds, [getattr(section, name) for name in kinds])[0]
        start, key = draw.randrange(1 << 30), draw_key(draw, num_digits, section.few_digits)
        later = draw.random() < self.ask_later and carried_key is not None
        text, num_asked = self.texts[kind], self._num_asked(num_digits)
        length = told_place.stop + num_filler + num_asked
        if kind == "book":
            return Row(text.filler.slice(start, length).tolist(), 0, None, is_told=False, held=None)
        if later:  # only filler, and the question for the key of the step before
            assert isinstance(carried_key, int)
            answer_ids = text.key_ids(carried_key)
            num_asked = len(text.question_ids) + len(answer_ids)
            ids = text.filler.slice(start, length - num_asked).tolist() + text.question_ids + answer_ids
            return Row(ids, len(answer_ids), carried_key, False, carried_key, num_asked_tokens=num_asked)
        prefix_ids = text.filler.slice(start, told_place.start).tolist()
        told = text.sequence(key, num_filler, start + told_place.start)
        ids = prefix_ids + told.ids[len(text.start_ids) :]
        return Row(ids, len(told.answer_ids), key, True, key, told_place.stop, num_asked_tokens=num_asked)
