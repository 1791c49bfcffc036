"""The base model with full attention as a teacher: what a reader of the memory should have in mind at every layer."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from transformerfam.decoder.cache_argument import as_cache
from transformerfam.tasks.batch import Batch
from transformerfam.weights.models import load_base


@dataclass(frozen=True)
class Lesson:
    """What the teacher had in mind over the questions and answers of one batch."""

    hidden_LBQD: torch.Tensor
    """Output of every layer over the last Q tokens of each row, zeros in rows without a question."""
    is_taught_BT: torch.Tensor
    """The tokens of the batch that are compared with it, all among the last Q."""
    text_hidden_BTD: torch.Tensor | None = None
    """Hidden states after the last norm over the batch's own tokens, read with full attention; None where predictions
    are not compared."""
    head: nn.Module | None = None
    """The teacher's language-model head, which makes predictions of them."""


@dataclass(frozen=True)
class Teaching:
    """A lesson, and how much it weighs."""

    lesson: Lesson
    weight: float = 0.0
    """Weight of the distance to the teacher's hidden states."""

    def is_about(self, columns_N: torch.Tensor) -> bool:
        """Return whether any of these tokens is compared with the teacher's hidden states."""
        return bool(self.lesson.is_taught_BT[:, columns_N].any())


class Teacher:
    """A base model that reads key and question in one piece, with full attention and its own weights."""

    def __init__(
        self,
        base: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        reads_text: bool = False,
    ) -> None:
        """Load the base model a second time, without memory.

        Args:
            base: as `model.base` of a recipe.
            device: where it is.
            dtype: of its weights.
            reads_text: whether it reads the batch's own tokens, too, for `loss.full_attention`.

        Raises:
            TransformerFamError: there is no such model.
        """
        self.model, _ = load_base(base)
        self.model.eval().to(device, dtype)
        self.reads_text = reads_text
        self.model.requires_grad_(False)
        self._common_ids_T: torch.Tensor | None = None
        self._common: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def read(self, batch: Batch) -> Lesson | None:
        """Return the lesson for a batch, None where there is no question and no text is compared."""
        text_hidden_BTD = None
        if self.reads_text:
            text_hidden_BTD = self.model.get_decoder()(batch.input_ids_BT.to(self.model.device)).last_hidden_state
        rest = (text_hidden_BTD, self.model.get_output_embeddings())
        if batch.teacher_ids_NT is None or batch.is_taught_BT is None:
            if not self.reads_text:
                return None
            is_taught_BT = torch.zeros_like(batch.is_key_BT)
            return Lesson(torch.zeros(0, len(batch.keys), 0, 0), is_taught_BT, *rest)
        num_taught = int(batch.is_taught_BT.any(dim=0).sum()) + 1  # the last token predicts nothing
        ids_NT = batch.teacher_ids_NT
        num_common = _num_common(ids_NT[:, :-num_taught])
        cache = self._cache_behind(ids_NT[0, :num_common], len(ids_NT))
        rest_NT = ids_NT[:, num_common:].to(self.model.device)
        output = self.model.get_decoder()(rest_NT, output_hidden_states=True, **as_cache(cache))
        tails_LNQD = torch.stack([layer[:, -num_taught:] for layer in output.hidden_states[1:]])
        lesson_LBQD = tails_LNQD.new_zeros(len(tails_LNQD), len(batch.keys), *tails_LNQD.shape[2:])
        lesson_LBQD[:, batch.is_key_BT.any(dim=1)] = tails_LNQD
        return Lesson(lesson_LBQD, batch.is_taught_BT, *rest)

    def _cache_behind(self, ids_T: torch.Tensor, num_rows: int) -> DynamicCache:
        """Return the cache of so many rows after tokens that they all begin with, read once and kept for later."""
        if self._common_ids_T is None or not torch.equal(ids_T, self._common_ids_T):
            read = DynamicCache(config=self.model.config)
            if len(ids_T):
                self.model.get_decoder()(ids_T[None].to(self.model.device), **as_cache(read))
            self._common_ids_T = ids_T
            self._common = [(layer.keys, layer.values) for layer in read.layers] if len(ids_T) else []
        cache = DynamicCache(config=self.model.config)
        for layer_idx, kept in enumerate(self._common):
            cache.update(*(tensor.expand(num_rows, -1, -1, -1) for tensor in kept), layer_idx)
        return cache


def _num_common(ids_NT: torch.Tensor) -> int:
    """Return how many tokens all rows begin with."""
    differs_T = (ids_NT != ids_NT[:1]).any(dim=0).nonzero()
    return int(differs_T[0, 0]) if len(differs_T) else ids_NT.shape[1]


def distance_to_teacher(
    lesson: Lesson, hidden_states: tuple[torch.Tensor, ...], columns_N: torch.Tensor
) -> torch.Tensor:
    """Return how far hidden states point from the teacher's: 1 - cosine, mean over layers, sum over taught tokens.

    Args:
        lesson: the teacher's hidden states at the end of the batch, and the tokens that they are for.
        hidden_states: `(B, N, D)` of the embedding and of every layer over some tokens of the batch.
        columns_N: which tokens they are.
    """
    rows, places = lesson.is_taught_BT[:, columns_N].nonzero(as_tuple=True)
    own_LKD = torch.stack([layer[rows, places] for layer in hidden_states[1:]])
    from_end = columns_N[places] - lesson.is_taught_BT.shape[1]
    theirs_LKD = lesson.hidden_LBQD[:, rows, from_end]
    return (1 - nn.functional.cosine_similarity(own_LKD, theirs_LKD, dim=-1)).mean(0).sum()


def divergence_from_teacher(
    lesson: Lesson, logits_NV: torch.Tensor, rows_N: torch.Tensor, columns_N: torch.Tensor
) -> torch.Tensor:
    """Return how far predictions are from the teacher's, KL(teacher, own) in nats for each, `(N,)`.

    Args:
        lesson: what the teacher made of the same text.
        logits_NV: the own predictions.
        rows_N: the row of the batch of each.
        columns_N: its token.
    """
    assert lesson.text_hidden_BTD is not None
    assert lesson.head is not None
    with torch.no_grad():
        theirs_NV = lesson.head(lesson.text_hidden_BTD[rows_N, columns_N]).float().log_softmax(-1)
    own_NV = logits_NV.log_softmax(-1)
    return nn.functional.kl_div(own_NV, theirs_NV, reduction="none", log_target=True).sum(-1)
