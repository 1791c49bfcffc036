"""Rows of random tokens that appear twice, whatever the task."""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformerfam.tasks.batch import Row, Written
from transformerfam.tasks.filler import load_filler
from transformerfam.tasks.text import encode


class RepeatedRows:
    """Write random tokens, and repeat them.

    To predict the second time, a model has to find what followed the same tokens before (an induction head). Keys
    distinguished by names, and facts, need just that, and hardly ever teach it by themselves.
    """

    NUM_WORDS = (6, 40)
    """Least and most different tokens of a row: the fewer, the more of them must agree to find the place."""
    NUM_FREE = 4
    """First tokens of the second time that are not predicted, since too little precedes them."""

    def __init__(self, tokenizer: Any, seed: int, known_words: Sequence[str]) -> None:
        """Tokenise the filler.

        Args:
            tokenizer: that of the recipe.
            seed: of all that is drawn.
            known_words: the words to draw from, where a task has few and the tokenizer thousands; none is every token.
        """
        self.tokenizer, self.seed, self.known_words = tokenizer, seed, known_words
        self.filler = load_filler(tokenizer, "sentences")

    @cached_property
    def vocabulary(self) -> list[int]:
        """The tokens that are drawn, without special ones."""
        if self.known_words:
            return sorted({token for word in self.known_words for token in encode(self.tokenizer, f" {word}")})
        return sorted(set(range(len(self.tokenizer))) - set(self.tokenizer.all_special_ids))

    def rows(self, step: int, num_filler: int, limits: tuple[int, int], num_rows: int) -> Written:
        """Write the rows of a step.

        Args:
            step: number of the step.
            num_filler: tokens of filler between the first time and the second.
            limits: least and most tokens that are repeated.
            num_rows: how many.

        Returns:
            The rows, whose question is the second time.
        """
        draw = random.Random(f"{self.seed}/{step}/repeated")
        length = draw.randint(*limits)
        rows = []
        for _ in range(num_rows):
            chosen = draw.sample(self.vocabulary, min(draw.randint(*self.NUM_WORDS), len(self.vocabulary)))
            ids = draw.choices(chosen, k=length)
            filler = self.filler.slice(draw.randrange(1 << 30), num_filler).tolist()
            rows.append(Row(ids + filler + ids, length - self.NUM_FREE, None, is_told=True, held=None))
        return Written(rows, length + num_filler)
