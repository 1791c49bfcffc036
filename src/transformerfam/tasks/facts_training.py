"""Training on facts: stories hidden in filler, and questions on them."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from transformerfam.tasks.batch import Held, Written
from transformerfam.tasks.facts import MOST_SUPPORTS, FactsText, Story, draw_story, words
from transformerfam.tasks.question import Question
from transformerfam.tasks.ranges import LimitsFrom1
from transformerfam.tasks.section import require
from transformerfam.tasks.writing import Asked, Drawn, TaskSection, Writer, asked_later, even_rows


class FactsSection(TaskSection):
    """Stories, hidden sentence by sentence, and questions whose answers follow from some of these."""

    fixed_keys: ClassVar[tuple[str, ...]] = (*TaskSection.fixed_keys, "fact_filler")
    text_keys: ClassVar[tuple[str, ...]] = ("fact_filler",)

    task: Literal["facts"] = "facts"
    """Stories, and questions whose answers follow from their sentences."""
    facts: LimitsFrom1
    """Least and most sentences from which the answer to a question follows, 1 to 3; every step draws one number."""
    facts_asked: LimitsFrom1 = (1, 1)
    """Least and most questions on a story, one after the other, each with an answer to predict; the last one has the
    drawn number of supports, the others at most as many. A row counts as right when all answers are."""
    fact_sentences: LimitsFrom1 = (4, 10)
    """Least and most sentences of a story."""
    fact_filler: str = "sentences"
    """What stories are hidden in: the passkey's sentences, a novel of the package, or a UTF-8 file."""

    @model_validator(mode="after")
    def _require_supports(self) -> Self:
        low, high = self.facts
        require(high <= MOST_SUPPORTS, f"data.facts is [{low}, {high}], required is 1 to {MOST_SUPPORTS}")
        fewest = self.fact_sentences[0]
        require(
            fewest >= high,
            f"data.fact_sentences begins at {fewest} and data.facts ends at {high}, required are no fewer "
            "sentences than an answer follows from; set data.fact_sentences higher",
        )
        return self

    def words(self) -> tuple[str, ...]:
        """Return the words of stories and questions."""
        return words()


class FactsWriter(Writer[FactsSection]):
    """Hide a story in filler, followed by questions on it; see `Writer`."""

    def __init__(self, section: FactsSection, tokenizer: Any, seed: int, ask_later: float) -> None:
        """Tokenise the filler; arguments and errors are those of `Writer`."""
        super().__init__(section, tokenizer, seed, ask_later)
        self.text = FactsText(tokenizer, section.fact_filler)
        self.filler = self.text.filler
        self.read = [self.filler]

    def rows(
        self, draw: random.Random, step: int, num_filler: int, section: FactsSection, carried: Sequence[Held | None]
    ) -> Written:
        """Write the rows of a step, with so much filler between the sentences in all; see `Writer.rows`."""
        draw = random.Random(f"{self.seed}/{step}/facts")
        num_supports, num_sentences = draw.randint(*section.facts), draw.randint(*section.fact_sentences)
        num_asked, end_ids = draw.randint(*section.facts_asked), self.text.encode(".")
        later, drawn = random.Random(f"{self.seed}/{step}/later"), []
        for held in carried:
            story = draw_story(draw, num_supports, num_sentences)
            chosen = draw.sample(story.further, min(num_asked - 1, len(story.further)))
            pairs = [*chosen, (story.question, story.answer)]
            asked = Asked([Question.of(self.text.encode(q), self.text.encode(a)) for q, a in pairs], end_ids)
            num_told = sum(len(self.text.encode(sentence)) for sentence in story.sentences)
            if later.random() < self.ask_later and held is not None:
                drawn.append(asked_later(held, self.text.filler, draw.randrange(1 << 30), end_ids))
                continue
            drawn.append(Drawn(partial(self._hidden, story, draw), num_told, asked, None))
        return even_rows(drawn, num_filler)

    def _hidden(self, story: Story, draw: random.Random, num_filler: int) -> tuple[list[int], int]:
        hidden = self.text.hide(story, num_filler, draw)
        return hidden.ids_T.tolist(), hidden.num_told_tokens
