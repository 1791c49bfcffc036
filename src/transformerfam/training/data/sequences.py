"""The batch of a training step, as a pure function of seed, step and stage, whatever the task.

For packed instructions see `instructions`.
"""

import dataclasses
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from transformerfam.errors import RecipeError
from transformerfam.tasks.batch import Batch, Held, Row
from transformerfam.tasks.registry import TASKS
from transformerfam.tasks.unknown_words import require_known, unknown_share
from transformerfam.training.data.repeated import RepeatedRows
from transformerfam.training.recipe.recipe import Recipe


def draw_block_size(seed: int, step: int, block_sizes: Sequence[int]) -> int:
    """Draw the block of a step."""
    return random.Random(f"{seed}/{step}/block").choice(block_sizes)


class SequenceBuilder:
    """Write the batches of a recipe.

    All rows of a batch have one length. It is drawn again for every step, token by token, so that question and key come
    to lie at every phase of a block and across its boundaries.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        """Tokenise the fillers.

        Raises:
            RecipeError: the folder of books is empty, or a question is longer than `schedule.gradient_tokens`.
            TransformerFamError: the tokenizer knows too little of the text.
        """
        self.schedule, self.loss, self.tokenizer = recipe.schedule, recipe.loss, tokenizer
        self.seed = recipe.schedule.seed
        self.batch_size = recipe.schedule.batch_size
        self.least_block_size = recipe.fam.block_size
        self.block_sizes = recipe.schedule.block_sizes or (self.least_block_size,)
        self.known_words = recipe.data.words()
        self.sections = [recipe.data_of(stage) for stage in recipe.schedule.curriculum]
        writer = TASKS[recipe.data.task].writer
        self.writer = writer(recipe.data, tokenizer, self.seed, recipe.state_passing.ask_later)
        read = [unknown_share(tokenizer, one.period_T.tolist()) for one in self.writer.read]
        if not recipe.data.allow_unknown:
            require_known(max(read, default=0.0), "the training text", "set data.allow_unknown = true")
        self.unknown_share = max([*read, unknown_share(tokenizer, self.writer.wording_ids)])
        asked = max((self.writer.num_asked_tokens(section) for section in self.sections), default=0)
        tokens = recipe.schedule.gradient_tokens
        if tokens is not None and tokens < asked:
            raise RecipeError(
                f"schedule.gradient_tokens is {tokens}, required is at least {asked}, so that question and answer, "
                "which may end a block, keep their gradient"
            )

    @cached_property
    def repeated(self) -> RepeatedRows:
        """What writes the stages with `repeated_tokens`."""
        return RepeatedRows(self.tokenizer, self.seed, self.known_words)

    def block_size(self, step: int) -> int:
        """Draw the block of a step."""
        return draw_block_size(self.seed, step, self.block_sizes)

    def num_repeats(self, step: int) -> int:
        """Draw the repeated updates of a step."""
        return random.Random(f"{self.seed}/{step}/repeats").randint(*self.schedule.repeat_updates)

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
            stored_ids_NT: blocks of filler to write it on. Then only the sentences with the key, the question with its
                answer, and `loss.num_other_tokens` before it are read.
        """
        draw = random.Random(f"{self.seed}/{step}/{stage_idx}")
        stage, section = self.schedule.curriculum[stage_idx], self.sections[stage_idx]
        block_size = self.block_size(step)
        longer = block_size - self.least_block_size
        limits = (stage.filler_tokens[0] + longer, stage.filler_tokens[1] + longer)
        num_filler = self.writer.draw_filler(draw, step, limits, section, block_size)
        if stage.repeated_tokens is not None:
            repeated = self.repeated.rows(step, num_filler, stage.repeated_tokens, self.batch_size)
            return self._weigh(repeated.rows, draw, repeated.question_start, None)
        carried = carried_keys or [None] * self.batch_size
        rows, start, told = self.writer.rows(draw, step, num_filler, section, carried)
        is_read_T: torch.Tensor | None = None
        sources: tuple[int, ...] = ()
        if stored_ids_NT is not None:
            length = len(rows[0].ids)
            is_read_T = torch.zeros(length, dtype=torch.bool)
            is_read_T[told] = True
            is_read_T[max(0, start - self.loss.num_other_tokens) :] = True
            num_blocks = -(-length // block_size)
            sources = self.sources(step, "sources", len(stored_ids_NT), num_blocks + self.num_repeats(step))
            filler_T = stored_ids_NT[list(sources[:num_blocks]), :block_size].flatten()
            rows = [_written_on(row, filler_T, told) for row in rows]
        batch = self._weigh(rows, draw, start, is_read_T)
        batch = dataclasses.replace(batch, is_read_T=is_read_T, sources=sources)
        return batch if self.loss.teacher == 0 else self._with_teacher(batch, rows, step)

    def _with_teacher(self, batch: Batch, rows: Sequence[Row], step: int) -> Batch:
        """Add what the teacher reads."""
        asking = [row for row in rows if row.num_asked_tokens]
        if not asking:
            return batch
        teacher_rows = self.writer.teacher_rows(asking, step, self.loss.teacher_filler_tokens)
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
        return self.writer.filler_rows(random.Random(f"{self.seed}/{number}/stored"), 1, num_tokens)

    def filler(self, step: int, num_tokens: int) -> torch.Tensor:
        """Return filler for every row, `(B, num_tokens)`, each from its own place and of the kinds of the recipe."""
        return self.writer.filler_rows(random.Random(f"{self.seed}/{step}/filler"), self.batch_size, num_tokens)

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
            if is_read_T is not None:  # of stored filler only what precedes the question is read
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


def _written_on(row: Row, filler_T: torch.Tensor, told: slice) -> Row:
    """Write a row's key, its question and its answer on stored filler."""
    ids = filler_T[: len(row.ids)].tolist()
    if row.is_told:
        ids[told] = row.ids[told]
    if row.num_asked_tokens:
        ids[-row.num_asked_tokens :] = row.ids[-row.num_asked_tokens :]
    return dataclasses.replace(row, ids=ids)
