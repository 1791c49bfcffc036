"""A question with its answer, as tokens."""

from collections.abc import Sequence
from typing import NamedTuple


class Question(NamedTuple):
    """A question of a sequence, and the answer that has to follow."""

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    telling_ids: tuple[int, ...] | None = None
    """The sentences that give the answer, for a teacher; None without one."""

    @classmethod
    def of(cls, ids: Sequence[int], answer_ids: Sequence[int], telling_ids: Sequence[int] | None = None) -> "Question":
        """Return the question of these tokens, of lists too, as JSON has them."""
        return cls(tuple(ids), tuple(answer_ids), None if telling_ids is None else tuple(telling_ids))
