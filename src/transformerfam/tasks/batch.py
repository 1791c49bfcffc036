"""What a training step reads and predicts: rows as a task's writer gives them, and the batch that they become."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from transformerfam.tasks.question import Question

Held = int | tuple[Question, ...]
"""What a row's memory has to recall: a passkey, or questions with their answers."""


@dataclass(frozen=True)
class Row:
    """One sequence before it is weighed: its tokens, and the length of the answer at its end."""

    ids: list[int]
    num_answer_tokens: int
    """Tokens at the end that must be predicted whole; 0 for plain text."""
    key: int | None
    """The queried key; with several questions, the last one."""
    is_told: bool
    """Whether the sequence gives that key; if not, it queries the key of the passed state."""
    held: Held | None
    """What its memory holds when all its answers are right; None without a question."""
    num_told_tokens: int = 0
    """Tokens up to the end of the last fact that it gives."""
    earlier_answers: tuple[range, ...] = ()
    """Places of the answers before the last one."""
    num_asked_tokens: int = 0
    """Tokens at the end of all questions and answers together."""
    tellings: tuple[tuple[int, ...], ...] = ()
    """What a teacher reads before the questions: the sentences that give each answer."""


class Written(NamedTuple):
    """The rows of a step, all of one length."""

    rows: list[Row]
    question_start: int
    """Where the earliest question begins."""
    told: slice = slice(0, 0)
    """The tokens of every row that give a fact, in tasks whose rows can be written on stored filler."""


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
    """First token of the question, of the earliest one where rows differ; the rows' length without a question."""
    keys: tuple[int | None, ...]
    """The key that each row queries."""
    is_told_B: torch.Tensor
    """Rows that give the key themselves; the others query a key of the passed state, or have no question."""
    held: tuple[Held | None, ...]
    """What each row's memory holds when its answers are right; None without a question."""
    num_told_B: torch.Tensor
    """Tokens of each row up to the end of the last fact that it gives."""
    teacher_ids_NT: torch.Tensor | None = None
    """What the teacher reads for every row with a question: its key, a few tokens later the same question and answer.
    None without a teacher."""
    is_taught_BT: torch.Tensor | None = None
    """Positions of question and answer, which the teacher has at the end of its own rows."""
    is_read_T: torch.Tensor | None = None
    """Tokens that are read; the others are stored filler. None is all."""
    sources: tuple[int, ...] = ()
    """The stored block of all rows: for every block of the batch, then for every repeated update."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are read in all rows."""
        num_rows, length = self.input_ids_BT.shape
        return num_rows * (length if self.is_read_T is None else int(self.is_read_T.sum()))

    def begun(self, start: Sequence[int], is_passed: bool) -> "Batch":
        """Return the batch, in which rows that begin a text begin with what the tokenizer begins texts with.

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
    """Return rows that all begin with the same values."""
    return torch.cat((torch.tensor(front, dtype=rows_BT.dtype).expand(len(rows_BT), -1), rows_BT), dim=1)
