"""Facts measured: how often a question is answered whose supports lie hidden in a long text."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from transformerfam.errors import TransformerFamError
from transformerfam.reading_state import ReadingState
from transformerfam.tasks.facts import FactsText, HiddenStory, draw_story
from transformerfam.tasks.passkey_evaluation import READ_TOKENS, greedy_tokens, padded, read_ragged
from transformerfam.tasks.provenance import provenance

TASK = "facts"


@dataclass(kw_only=True)
class FactsEvaluation:
    """Ask questions with one, two or three supports on stories in texts of several lengths.

    Raises:
        TransformerFamError: a length or a number is out of its range.
    """

    filler_lengths: Sequence[int]
    """Tokens of the text that a story is hidden in."""

    num_supports: Sequence[int] = (1, 2, 3)
    """Sentences from which an answer follows; each number has texts of its own."""

    num_sentences: int = 10
    """Sentences of a story."""

    num_texts: int = 20
    """Texts for every length and number of supports."""

    seed: int = 0
    system: str = "fam"
    model_name: str = "unnamed"
    filler: str = "sentences"
    batch_size: int = 10
    """Texts that are read side by side."""

    progress: Callable[[int, int, ReadingState], None] | None = None
    """Called with the tokens of filler done, those to do, and the state."""

    def __post_init__(self) -> None:
        if not self.filler_lengths or min(self.filler_lengths) < 0:
            raise TransformerFamError(
                f"filler_lengths is {list(self.filler_lengths)}, required are one or more numbers of at least 0"
            )
        for name in ("num_texts", "batch_size"):
            if getattr(self, name) < 1:
                raise TransformerFamError(f"{name} is {getattr(self, name)}, required is at least 1")
        self.filler_lengths = sorted(set(self.filler_lengths))

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read, ask, and yield one row per question.

        Args:
            model: a model with a memory.
            tokenizer: its tokenizer.
        """
        text, done = FactsText(tokenizer, self.filler), 0
        total = sum(self.filler_lengths) * len(self.num_supports) * self.num_texts
        for length in self.filler_lengths:
            for num_supports in self.num_supports:
                for start in range(0, self.num_texts, self.batch_size):
                    numbers = range(start, min(self.num_texts, start + self.batch_size))
                    draws = [random.Random(f"{self.seed}/{length}/{num_supports}/{n}/facts") for n in numbers]
                    hidden = [
                        text.hide(draw_story(draw, num_supports, self.num_sentences), length, draw) for draw in draws
                    ]
                    yield from self._batch(model, text, hidden, (length, num_supports, start), (done, total))
                    done += length * len(hidden)

    def _batch(
        self,
        model: Any,
        text: FactsText,
        hidden: list[HiddenStory],
        place: tuple[int, int, int],
        share: tuple[int, int],
    ) -> Iterator[dict[str, Any]]:
        length, num_supports, first = place
        shortest = min(len(story.ids_T) for story in hidden)
        state: ReadingState | None = None
        for begin in range(0, shortest, READ_TOKENS):
            ids_BT = torch.stack([story.ids_T[begin : min(shortest, begin + READ_TOKENS)] for story in hidden])
            state = model.read(ids_BT, state)
            if self.progress is not None:
                self.progress(share[0] + len(hidden) * min(length, begin + READ_TOKENS), share[1], state)
        state = read_ragged(model, [story.ids_T[shortest:] for story in hidden], state)
        ids_BT, mask_BT = padded([torch.tensor(story.question_ids) for story in hidden])
        mask = None if bool(mask_BT.all()) else mask_BT
        said_BT = greedy_tokens(model, ids_BT, state, max(len(story.answer_ids) for story in hidden), mask)
        for row, story in enumerate(hidden):
            said = said_BT[row, : len(story.answer_ids)].tolist()
            yield {
                "task": TASK,
                "system": self.system,
                "model": self.model_name,
                "seed": self.seed,
                "filler": text.filler.name,
                "filler_tokens": length,
                "text": first + row,
                "num_supports": num_supports,
                "num_sentences": self.num_sentences,
                "support_distances": list(story.support_distances),
                "wanted": text.decode(story.answer_ids),
                "answer": text.decode(said),
                "correct": said == story.answer_ids,
                **provenance(),
            }
