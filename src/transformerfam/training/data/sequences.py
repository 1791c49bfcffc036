"""The batch of a training step, as a pure function of seed, step and stage.

Packed instructions stand in `instructions`.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transformerfam.errors import RecipeError
from transformerfam.tasks.named_keys import draw_key
from transformerfam.tasks.passkey import PAPER, SHORT, FillerStream, PasskeyText
from transformerfam.tasks.text import encode, read_text, require_known, unknown_share
from transformerfam.training.data.told_rows import FactRows, Held, NamedRows, RepeatedRows, Row
from transformerfam.training.data.worded_rows import WordedRows
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.recipe.sections import DataSection, LossSection, Stage


@dataclass(frozen=True)
class Batch:
    """What one step trains on. Position t predicts token t + 1."""

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    """The next token of every position."""
    weights_BT: torch.Tensor
    """Weight of every position in the loss; most are zero. Each kind sums to its weight in the recipe."""
    is_key_BT: torch.Tensor
    """Positions that predict the key."""
    question_start: int
    """First token of the question, of the earliest one where rows differ; the length of the rows where no row asks."""
    keys: tuple[int | None, ...]
    """The key that each row asks for."""
    is_told_B: torch.Tensor
    """Rows that tell the key themselves; the others ask for a key of the passed state, or ask nothing."""
    held: tuple[Held | None, ...]
    """What each row's memory holds when its answers are right; None where it asks nothing."""
    num_told_B: torch.Tensor
    """Tokens of each row up to the end of the last thing that it tells."""
    teacher_ids_NT: torch.Tensor | None = None
    """What the teacher reads for every row that asks: its key told a few tokens before, the same question and answer at
    the end. None without a teacher."""
    is_taught_BT: torch.Tensor | None = None
    """Positions of question and answer, which the teacher has at the end of its own rows."""
    is_read_T: torch.Tensor | None = None
    """Tokens that are read; at the others stored filler stands. None is all."""
    sources: tuple[int, ...] = ()
    """The stored block of all rows: for every block of the batch, then for every repeated update."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are read in all rows."""
        num_rows, length = self.input_ids_BT.shape
        return num_rows * (length if self.is_read_T is None else int(self.is_read_T.sum()))

    def begun(self, start: Sequence[int], is_passed: bool) -> "Batch":
        """Return the batch with what the tokenizer begins texts with in front of rows that begin one.

        The teacher's do always, the batch's unless a state is passed, which they continue.

        Args:
            start: token ids, often none.
            is_passed: whether the rows continue what was read in an earlier step.
        """
        num, batch = len(start), self
        if self.teacher_ids_NT is not None and not _begins(self.teacher_ids_NT, start):
            batch = dataclasses.replace(batch, teacher_ids_NT=_with_front(self.teacher_ids_NT, start))
        if is_passed or _begins(self.input_ids_BT, start):
            return batch
        ids, taught = _with_front(self.input_ids_BT, start), self.is_taught_BT
        return dataclasses.replace(
            batch,
            input_ids_BT=ids,
            labels_BT=ids.roll(-1, dims=1),  # the last column has weight 0
            weights_BT=_with_front(self.weights_BT, [0.0] * num),
            is_key_BT=_with_front(self.is_key_BT, [False] * num),
            question_start=self.question_start + num,
            num_told_B=self.num_told_B + num,
            is_taught_BT=None if taught is None else _with_front(taught, [False] * num),
        )


def _begins(rows_BT: torch.Tensor, start: Sequence[int]) -> bool:
    return bool(rows_BT[:, : len(start)].eq(torch.tensor(start, dtype=rows_BT.dtype)).all())


def _with_front(rows_BT: torch.Tensor, front: Sequence[Any]) -> torch.Tensor:
    """Return rows with the same values in front of each."""
    return torch.cat((torch.tensor(front, dtype=rows_BT.dtype).expand(len(rows_BT), -1), rows_BT), dim=1)


def draw_block_size(seed: int, step: int, block_sizes: Sequence[int]) -> int:
    """Draw the block of a step."""
    return random.Random(f"{seed}/{step}/block").choice(block_sizes)


class SequenceBuilder:
    """Write the batches of a recipe.

    All rows of a batch have one length. It is drawn anew for every step, token by token, so that question and key come
    to stand at every phase of a block and across its boundaries.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        """Tokenise the fillers.

        Raises:
            RecipeError: the folder of books is empty, or a question is longer than `schedule.gradient_tokens`.
            TransformerFamError: the tokenizer knows too little of the text.
        """
        self.schedule = recipe.schedule
        self.seed = recipe.schedule.seed
        self.batch_size = recipe.schedule.batch_size
        self.least_block_size = recipe.fam.block_size
        self.block_sizes = recipe.schedule.block_sizes or (self.least_block_size,)
        self.stages: Sequence[Stage] = recipe.schedule.curriculum
        self.repeat_updates = recipe.schedule.repeat_updates
        self.ask_later = recipe.state_passing.ask_later
        self.data: DataSection = recipe.data
        self.loss: LossSection = recipe.loss
        book = load_books(tokenizer, recipe.data.books) if recipe.data.books else None
        wording = SHORT if recipe.data.short_intro else PAPER
        in_book = PasskeyText(tokenizer, book, wording) if book else None
        in_sentences = PasskeyText(tokenizer, wording=wording)
        self.texts = {"passkey_sentences": in_sentences, "passkey_book": in_book, "book": in_book}
        text = self.texts["passkey_sentences"]
        assert text is not None
        self.told: NamedRows | FactRows | WordedRows | None = None  # what writes rows that are no passkeys of one key
        if recipe.data.worded:
            self.told = WordedRows(recipe, tokenizer, [book] if book else [in_sentences.filler])
        elif recipe.data.named_keys[1]:
            self.told = NamedRows(recipe, tokenizer)
        elif recipe.data.facts[1]:
            self.told = FactRows(recipe, tokenizer, recipe.data.fact_filler)
        read = [book] if book else []
        if isinstance(self.told, FactRows):
            read.append(self.told.text.filler)
        self.unknown_share = max((unknown_share(tokenizer, one.period_T.tolist()) for one in read), default=0.0)
        if not recipe.data.allow_unknown:
            require_known(self.unknown_share, "the training text", "set data.allow_unknown = true")
        said = text.wording_ids if self.told is None else getattr(self.told, "wording_ids", [])
        self.unknown_share = max(self.unknown_share, unknown_share(tokenizer, said))
        self.repeated = RepeatedRows(recipe, tokenizer, text.filler)
        self.num_question_tokens = len(text.question_ids)
        _, num_longest_answer = self._num_key_tokens(recipe.data.key_digits[1])
        asked, tokens = self.num_question_tokens + num_longest_answer, recipe.schedule.gradient_tokens
        if tokens is not None and tokens < asked:
            raise RecipeError(
                f"schedule.gradient_tokens is {tokens}, required is at least {asked}, so that question and answer, "
                "which may end a block, keep their gradient"
            )

    def block_size(self, step: int) -> int:
        """Draw the block of a step."""
        return draw_block_size(self.seed, step, self.block_sizes)

    def num_repeats(self, step: int) -> int:
        """Draw the repeated updates of a step."""
        return random.Random(f"{self.seed}/{step}/repeats").randint(*self.repeat_updates)

    def batch(
        self,
        step: int,
        stage_idx: int,
        carried_keys: Sequence[Held | None] | None = None,
        stored_ids_NT: torch.Tensor | None = None,
    ) -> Batch:
        """Write the batch of a step.

        Args:
            step: number of the step, from 0.
            stage_idx: stage of the curriculum, from 0.
            carried_keys: what the passed state of each row holds, or None where it holds nothing or no state is passed.
            stored_ids_NT: blocks of filler to write it on. Then only the key's sentences, the question with its answer,
                and `loss.num_other_tokens` in front of it are read.
        """
        draw = random.Random(f"{self.seed}/{step}/{stage_idx}")
        stage = self.stages[stage_idx]
        limits = stage.prefix_tokens or self.data.prefix_tokens
        num_prefix = random.Random(f"{self.seed}/{step}/prefix").randint(*limits)
        num_digits = random.Random(f"{self.seed}/{step}/digits").randint(*self.data.key_digits)
        longer = self.block_size(step) - self.least_block_size
        low, high = stage.filler_tokens
        num_filler = self._draw_filler(draw, step, num_prefix, num_digits, (low + longer, high + longer))
        carried = carried_keys or [None] * self.batch_size
        other_task = self.told if stage.repeated_tokens is None else self.repeated
        if other_task is not None:
            told_rows, question_start = other_task.rows(step, num_filler, stage, carried)
            batch = self._weigh(told_rows, draw, question_start, None)
            return batch if self.loss.teacher == 0 else self._with_told_teacher(batch, told_rows, step)
        rows = [self._row(draw, num_prefix, num_digits, num_filler, key) for key in carried]
        length = len(rows[0].ids)
        asked = [self.num_question_tokens + row.num_answer_tokens for row in rows if row.key is not None]
        question_start = length - max(asked, default=0)
        is_read_T: torch.Tensor | None = None
        sources: tuple[int, ...] = ()
        if stored_ids_NT is not None:
            num_intro, _ = self._num_key_tokens(num_digits)
            told = slice(num_prefix, num_prefix + num_intro)
            is_read_T = torch.zeros(length, dtype=torch.bool)
            is_read_T[told] = True
            is_read_T[max(0, question_start - self.loss.num_other_tokens) :] = True
            num_blocks = -(-length // self.block_size(step))
            sources = self.sources(step, "sources", len(stored_ids_NT), num_blocks + self.num_repeats(step))
            filler_T = stored_ids_NT[list(sources[:num_blocks]), : self.block_size(step)].flatten()
            rows = [self._written_on(row, filler_T, told) for row in rows]
        batch = self._weigh(rows, draw, question_start, is_read_T)
        batch = dataclasses.replace(batch, is_read_T=is_read_T, sources=sources)
        return batch if self.loss.teacher == 0 or not asked else self._with_teacher(batch, step)

    def _num_key_tokens(self, num_digits: int) -> tuple[int, int]:
        """Return the tokens of the sentences that tell a key of so many digits, and those of the key."""
        text = self.texts["passkey_sentences"]
        assert text is not None
        key = 10 ** (num_digits - 1)
        return len(text.intro_ids(key)), len(text.key_ids(key))

    def _draw_filler(
        self, draw: random.Random, step: int, num_prefix: int, num_digits: int, limits: tuple[int, int]
    ) -> int:
        """Draw the number of filler tokens, in a share of the steps among those that part the question."""
        num_filler = draw.randint(*limits)
        boundary = random.Random(f"{self.seed}/{step}/boundary")
        if self.data.boundary_share == 0 or boundary.random() >= self.data.boundary_share:
            return num_filler
        num_intro, num_answer = self._num_key_tokens(num_digits)
        parting = [
            number
            for number in range(limits[0], limits[1] + 1)
            if 0 < -(num_prefix + num_intro + number) % self.block_size(step) < self.num_question_tokens + num_answer
        ]
        return boundary.choice(parting) if parting else num_filler

    def _row(
        self, draw: random.Random, num_prefix: int, num_digits: int, num_filler: int, carried_key: Held | None
    ) -> Row:
        kinds = ("passkey_sentences", "passkey_book", "book")
        kind = draw.choices(kinds, [getattr(self.data, name) for name in kinds])[0]
        start, key = draw.randrange(1 << 30), draw_key(draw, num_digits, self.data.few_digits)
        later = draw.random() < self.ask_later and carried_key is not None
        text = self.texts[kind]
        assert text is not None
        num_intro, num_answer = self._num_key_tokens(num_digits)
        length = num_prefix + num_intro + num_filler + self.num_question_tokens + num_answer
        if kind == "book":
            return Row(text.filler.slice(start, length).tolist(), 0, None, is_told=False, held=None)
        if later:  # filler alone, where the key would be told, and the question for the key of the step before
            assert isinstance(carried_key, int)
            answer_ids = text.key_ids(carried_key)
            num_before_question = length - self.num_question_tokens - len(answer_ids)
            ids = text.filler.slice(start, num_before_question).tolist() + text.question_ids + answer_ids
            return Row(ids, len(answer_ids), carried_key, is_told=False, held=carried_key)
        prefix_ids = text.filler.slice(start, num_prefix).tolist()
        told = text.sequence(key, num_filler, start + num_prefix)
        return Row(prefix_ids + told.ids[len(text.start_ids) :], num_answer, key, True, key, num_prefix + num_intro)

    def _written_on(self, row: Row, filler_T: torch.Tensor, told: slice) -> Row:
        """Write a row's key, question and answer on stored filler."""
        ids = filler_T[: len(row.ids)].tolist()
        if row.is_told:
            ids[told] = row.ids[told]
        if row.key is not None:
            asked = slice(-(self.num_question_tokens + row.num_answer_tokens), None)
            ids[asked] = row.ids[asked]
        return dataclasses.replace(row, ids=ids)

    def _with_teacher(self, batch: Batch, step: int) -> Batch:
        """Add what the teacher reads: shorter keys get a longer filler, so that all rows have one length."""
        text = self.texts["passkey_sentences"]
        assert text is not None
        num_filler = random.Random(f"{self.seed}/{step}/teacher").randint(*self.loss.teacher_filler_tokens)
        keys = [key for key in batch.keys if key is not None]
        lengths = [len(text.sequence(key, 0).ids) for key in keys]
        longest = num_filler + max(lengths)
        rows = [text.sequence(key, longest - length).ids for key, length in zip(keys, lengths, strict=True)]
        is_taught = torch.zeros_like(batch.is_key_BT)
        for row, key in enumerate(batch.keys):
            if key is not None:
                is_taught[row, -(self.num_question_tokens + len(text.key_ids(key))) : -1] = True
        return dataclasses.replace(batch, teacher_ids_NT=torch.tensor(rows), is_taught_BT=is_taught)

    def _with_told_teacher(self, batch: Batch, rows: Sequence[Row], step: int) -> Batch:
        """Add what the teacher reads: filler, the sentences that tell the answers, filler, and the questions."""
        assert self.told is not None
        asking = [row for row in rows if row.num_asked_tokens]
        if not asking:
            return batch
        draw = random.Random(f"{self.seed}/{step}/teacher")
        filler, num_filler = self.told.text.filler, draw.randint(*self.loss.teacher_filler_tokens)
        told = [[token for telling in row.tellings for token in telling] for row in asking]
        longest = num_filler + max(len(ids) + row.num_asked_tokens for ids, row in zip(told, asking, strict=True))
        teacher_rows = []
        for ids, row in zip(told, asking, strict=True):
            start, num_between = draw.randrange(1 << 30), draw.randint(0, num_filler)
            num_before = longest - len(ids) - num_between - row.num_asked_tokens
            before = filler.slice(start, num_before).tolist()
            between = filler.slice(start + num_before, num_between).tolist()
            teacher_rows.append(before + ids + between + row.ids[-row.num_asked_tokens :])
        is_taught = torch.zeros_like(batch.is_key_BT)
        for number, row in enumerate(rows):
            if row.num_asked_tokens:
                is_taught[number, -row.num_asked_tokens : -1] = True
        return dataclasses.replace(batch, teacher_ids_NT=torch.tensor(teacher_rows), is_taught_BT=is_taught)

    def sources(self, step: int, purpose: str, num_stored: int, num_blocks: int) -> tuple[int, ...]:
        """Draw stored blocks of filler for a step; each purpose has its own draw."""
        return tuple(random.Random(f"{self.seed}/{step}/{purpose}").choices(range(num_stored), k=num_blocks))

    def stored_ids(self, number: int, num_tokens: int) -> torch.Tensor:
        """Return block `number` of the stored filler, `(1, num_tokens)`."""
        return self._filler_rows(random.Random(f"{self.seed}/{number}/stored"), 1, num_tokens)

    def filler(self, step: int, num_tokens: int) -> torch.Tensor:
        """Return filler for every row, `(B, num_tokens)`, each from its own place and of the kinds of the recipe."""
        return self._filler_rows(random.Random(f"{self.seed}/{step}/filler"), self.batch_size, num_tokens)

    def _filler_rows(self, draw: random.Random, num_rows: int, num_tokens: int) -> torch.Tensor:
        if self.told is not None:
            return torch.stack(
                [self.told.text.filler.slice(draw.randrange(1 << 30), num_tokens) for _ in range(num_rows)]
            )
        kinds = ("passkey_sentences", "passkey_book")
        shares = [getattr(self.data, name) for name in kinds]
        rows = []
        for kind in draw.choices(kinds, shares, k=num_rows):
            text = self.texts[kind]
            assert text is not None
            rows.append(text.filler.slice(draw.randrange(1 << 30), num_tokens))
        return torch.stack(rows)

    def _weigh(
        self, rows: Sequence[Row], draw: random.Random, question_start: int, is_read_T: torch.Tensor | None
    ) -> Batch:
        ids = torch.tensor([row.ids for row in rows])
        is_key, is_other = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        length = ids.shape[1]
        for i, row in enumerate(rows):
            first_answer = length - 1 - row.num_answer_tokens  # position that predicts the first token of the answer
            is_key[i, first_answer : length - 1] = row.num_answer_tokens > 0
            for answer in row.earlier_answers:
                is_key[i, answer.start - 1 : answer.stop - 1] = True
            others = range(question_start if row.earlier_answers else first_answer)
            if is_read_T is not None:  # of stored filler only what stands in front of the question is read
                others = range(max(0, question_start - self.loss.num_other_tokens), min(question_start, first_answer))
            chosen = draw.sample(others, min(self.loss.num_other_tokens, len(others)))
            is_other[i, chosen] = True
        weights = torch.zeros(ids.shape)
        for mask, weight in ((is_key, self.loss.key), (is_other, self.loss.other_tokens)):
            weights[mask] = weight / max(1, int(mask.sum()))
        labels = torch.cat((ids[:, 1:], ids[:, :1]), dim=1)  # the last column has weight 0
        return Batch(
            ids,
            labels,
            weights,
            is_key,
            question_start,
            tuple(row.key for row in rows),
            torch.tensor([row.is_told for row in rows]),
            tuple(row.held for row in rows),
            torch.tensor([row.num_told_tokens for row in rows]),
        )


def load_books(tokenizer: Any, folder: str | Path) -> FillerStream:
    """Tokenise all `.txt` files of a folder, in the order of their names.

    Raises:
        RecipeError: there is no such file.
        TransformerFamError: a file is not UTF-8.
    """
    paths = sorted(Path(folder).glob("*.txt"))
    if not paths:
        raise RecipeError(
            f"data.books is {str(folder)!r}, required is a folder with at least one .txt file; put books there"
        )
    tokens: list[int] = []
    read: Callable[[Path], str] = read_text
    texts = [read(path) for path in paths]
    if not any(text.strip() for text in texts):
        raise RecipeError(f"data.books is {str(folder)!r}, whose .txt files are empty; put text there")
    for text in texts:
        for paragraph in text.split("\n\n"):  # long texts at once make tokenizers slow and warn
            tokens += encode(tokenizer, paragraph + "\n\n")
    return FillerStream(tokens, Path(folder).name)
