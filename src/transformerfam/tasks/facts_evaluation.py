"""Facts measured: how often a question is answered whose supports lie hidden in a long text."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transformerfam.tasks.facts import FactsText, HiddenStory, Story, draw_story
from transformerfam.tasks.provenance import questions_of, weights_of
from transformerfam.tasks.ragged import greedy_tokens, padded, read_ragged
from transformerfam.tasks.texts_evaluation import TextsEvaluation
from transformerfam.tasks.unknown_words import require_filler

TASK = "facts"


@dataclass(kw_only=True)
class FactsEvaluation(TextsEvaluation):
    """Ask questions with one, two or three supports on stories in texts of several lengths.

    The filler is all of the text that a story is hidden in.

    Raises:
        TransformerFamError: a length or a number is out of its range.
    """

    num_supports: Sequence[int] = (1, 2, 3)
    """Sentences from which an answer follows; each number has its own texts."""

    num_sentences: int = 10
    """Sentences of a story."""

    num_texts: int = 20
    """Texts for every length and number of supports."""

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, evaluate, and yield one row per question.

        Args:
            model: a model with a memory.
            tokenizer: its tokenizer.
        """
        text, done = self.text(tokenizer), 0
        total = sum(self.filler_lengths) * len(self.num_supports) * self.num_texts
        for length in self.filler_lengths:
            for num_supports in self.num_supports:
                for start in range(0, self.num_texts, self.batch_size):
                    numbers = range(start, min(self.num_texts, start + self.batch_size))
                    stories = [self.story(length, num_supports, number) for number in numbers]
                    hidden = [text.hide(story, length, draw) for story, draw in stories]
                    yield from self._batch(model, text, hidden, (length, num_supports, start), (done, total))
                    done += length * len(hidden)

    def story(self, length: int, num_supports: int, number: int) -> tuple[Story, random.Random]:
        """Return the story of a text, and the source of its places in the filler."""
        draw = random.Random(f"{self.seed}/{length}/{num_supports}/{number}/facts")
        return draw_story(draw, num_supports, self.num_sentences), draw

    def text(self, tokenizer: Any) -> FactsText:
        """Return what writes the texts.

        Raises:
            TransformerFamError: the tokenizer knows too little of the filler, or not all words of the stories.
        """
        text = FactsText(tokenizer, self.filler)
        require_filler(tokenizer, text.filler)
        return text

    def questions(self, filler_digest: str) -> dict[str, str]:
        """Return the field `questions` of rows, by the digest of the filler's text."""
        return questions_of(filler_digest)

    def _batch(
        self,
        model: Any,
        text: FactsText,
        hidden: list[HiddenStory],
        place: tuple[int, int, int],
        share: tuple[int, int],
    ) -> Iterator[dict[str, Any]]:
        length, num_supports, first = place
        texts = [torch.cat((torch.tensor(text.start_ids, dtype=torch.long), story.ids_T)) for story in hidden]
        shortest = min(map(len, texts))
        move = self.moved(share, len(hidden), most=length)
        state = model.read(torch.stack([ids_T[:shortest] for ids_T in texts]), progress=move)
        state = read_ragged(model, [ids_T[shortest:] for ids_T in texts], state)
        ids_BT, mask_BT = padded([torch.tensor(story.question_ids) for story in hidden])
        mask = None if bool(mask_BT.all()) else mask_BT
        said_BT = greedy_tokens(model, ids_BT, state, max(len(story.answer_ids) for story in hidden), mask)
        for row, story in enumerate(hidden):
            said = said_BT[row, : len(story.answer_ids)].tolist()
            yield self.row(
                TASK,
                text.filler.name,
                length,
                first + row,
                num_supports=num_supports,
                num_sentences=self.num_sentences,
                support_distances=list(story.support_distances),
                wanted=text.decode(story.answer_ids),
                answer=text.decode(said),
                correct=said == story.answer_ids,
                **self.questions(text.filler.digest),
                **weights_of(model),
            )
