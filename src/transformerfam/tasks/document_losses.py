"""Next-token loss on documents: by place in the document and in the block, and for names seen long before."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.decoder.memory import memory_of
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.documents import Document, digest_of_texts, read_documents
from transformerfam.tasks.next_token import token_losses
from transformerfam.tasks.provenance import provenance, questions_of, weights_of

TASK = "documents"
PLACES = (0, 1024, 4096, 16384)
BLOCK_START = 16
"""First tokens of a block, which see the least of what came before."""

Finished = tuple[int, int]
"""Document and place of a row."""


@dataclass(kw_only=True)
class DocumentLosses:
    """Measure the loss on stretches of a text.

    Source: section 4.3 of arXiv 2404.09173.

    Raises:
        TransformerFamError: a number is out of its range.
    """

    path: str | Path
    """UTF-8 text, a folder of them, or the name of a novel of the package."""
    text: str = ""
    """Name of it in the rows; the name of the file if not given."""
    num_documents: int = 50
    document_tokens: int = 18_432
    places: Sequence[int] = PLACES
    """First token of each part of a document; the last part ends with the document."""
    far_tokens: int = 1024
    """Tokens since a name was last seen, from which on it counts as far."""
    block_size: int | None = None
    """Of the blocks whose first tokens are measured; None: the memory's."""
    stride: int | None = None
    """Read so many tokens at a time, each time after the same number of tokens before them and nothing else: full
    attention in texts that are longer than the model's context. None reads a document from its beginning."""
    batch_size: int = 4
    """Documents that are read side by side."""
    system: str = "fam"
    model_name: str = "unnamed"
    seed: int = 0
    finished: Collection[Finished] = ()
    progress: Callable[[int, int, ReadingState], None] | None = None
    """Called after every piece with the tokens done, those to do, and the state."""

    def __post_init__(self) -> None:
        for name, least in (("far_tokens", 1), ("batch_size", 1), ("stride", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise TransformerFamError(f"{name} is {getattr(self, name)}, required is at least {least}; change it")
        places = list(self.places)
        if not places or places != sorted(set(places)) or places[0] < 0 or places[-1] >= self.document_tokens - 1:
            raise TransformerFamError(
                f"places is {places}, required are numbers from 0 to {self.document_tokens - 2}, smallest first"
            )
        self.text = self.text or Path(self.path).stem

    @cached_property
    def digest(self) -> str:
        """Digest of the text."""
        return digest_of_texts(self.path)

    def documents(self, tokenizer: Any) -> list[Document]:
        """Return what is read; see `read_documents`."""
        return read_documents(self.path, tokenizer, self.num_documents, self.document_tokens)

    @property
    def questions(self) -> str:
        """The field `questions` of its rows."""
        return questions_of(self.num_documents, self.document_tokens, list(self.places), self.far_tokens)["questions"]

    def rows(self, model: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        """Read all documents and yield one row for every part of each.

        Args:
            model: a model with a memory.
            tokenizer: its tokenizer.

        Raises:
            TransformerFamError: see `read_documents`.
        """
        documents, config = self.documents(tokenizer), memory_of(model).config
        parts = list(itertools.pairwise([*self.places, self.document_tokens]))
        begins = [begin for begin, _ in parts]
        todo = [n for n in range(len(documents)) if any((n, begin) not in self.finished for begin in begins)]
        for first in range(0, len(todo), self.batch_size):
            numbers = todo[first : first + self.batch_size]
            losses_BT, is_right_BT, state = self._read(model, [documents[n] for n in numbers], first, len(todo))
            for number, loss_T, is_right_T in zip(numbers, losses_BT, is_right_BT, strict=True):
                for begin, end in parts:
                    if (number, begin) in self.finished:
                        continue
                    yield {
                        "task": TASK,
                        "system": self.system,
                        "model": self.model_name,
                        "seed": self.seed,
                        "text": self.text,
                        "text_digest": self.digest,
                        "document": number,
                        "source": documents[number].source,
                        "first_token": begin,
                        "num_tokens": end - begin,
                        **self._measured(model, documents[number], loss_T, is_right_T, begin, end),
                        "far_tokens": self.far_tokens,
                        "stride": self.stride,
                        "state_bytes": state.num_bytes // state.batch_size,
                        "fam_length": getattr(config, "fam_length", None),
                        "num_memory_segments": getattr(config, "num_memory_segments", None),
                        "questions": self.questions,
                        **weights_of(model),
                        **provenance(),
                    }

    def _read(
        self, model: Any, documents: Sequence[Document], first: int, num_documents: int
    ) -> tuple[Tensor, Tensor, ReadingState]:
        def update(state: ReadingState, num_before: int = 0) -> None:
            if self.progress is not None:
                done = first * self.document_tokens + len(documents) * (num_before + state.num_tokens_read)
                self.progress(done, num_documents * self.document_tokens, state)

        ids_BT = torch.stack([document.ids_T for document in documents])
        if self.stride is None:
            return token_losses(model, ids_BT, update)
        losses, rights = [], []
        for begin in range(0, self.document_tokens, self.stride):
            first_read = max(0, begin - self.stride)
            loss_BT, is_right_BT, state = token_losses(model, ids_BT[:, first_read : begin + self.stride])
            num_before = max(0, begin - first_read - 1)  # the first token that is read is not predicted
            losses.append(loss_BT[:, num_before:])
            rights.append(is_right_BT[:, num_before:])
            update(state, first_read)
        return torch.cat(losses, dim=1), torch.cat(rights, dim=1), state

    def _measured(
        self, model: Any, document: Document, loss_T: Tensor, is_right_T: Tensor, begin: int, end: int
    ) -> dict[str, Any]:
        """Return the fields of a part: means over its tokens, over those that begin a block, and over far names."""
        place_T = torch.arange(1, self.document_tokens)  # the first token is read and not predicted
        is_here_T = (begin <= place_T) & (place_T < end)
        block_size = self.block_size or memory_of(model).config.block_size
        is_start_T = is_here_T & (place_T >= block_size) & (place_T % block_size < BLOCK_START)
        is_far_T = is_here_T & (document.gap_T[1:] >= self.far_tokens)

        def mean(values_T: Tensor, chosen_T: Tensor) -> float | None:
            return round(values_T[chosen_T].double().mean().item(), 6) if chosen_T.any() else None

        return {
            "loss": mean(loss_T, is_here_T),
            "accuracy": mean(is_right_T, is_here_T),
            "num_predicted": int(is_here_T.sum()),
            "block_start_loss": mean(loss_T, is_start_T),
            "num_block_start": int(is_start_T.sum()),
            "far_loss": mean(loss_T, is_far_T),
            "far_accuracy": mean(is_right_T, is_far_T),
            "num_far": int(is_far_T.sum()),
        }


def finished_parts(rows: Sequence[dict[str, Any]], losses: DocumentLosses) -> set[Finished]:
    """Return the parts of documents that rows have already."""
    own = (losses.system, losses.model_name, losses.seed, losses.digest, losses.questions, losses.stride)
    return {
        (row["document"], row["first_token"])
        for row in rows
        if row["task"] == TASK
        and (row["system"], row["model"], row["seed"], row["text_digest"], row["questions"], row.get("stride")) == own
    }
