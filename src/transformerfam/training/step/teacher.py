"""The base model with full attention as a teacher: what a reader of the memory should have in mind at every layer."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from transformerfam.decoder.as_base import as_base, head_of_base
from transformerfam.decoder.cache_argument import as_cache
from transformerfam.files.tensors import digest_tensors
from transformerfam.tasks.batch import Batch
from transformerfam.training.step.attention_outputs import AttentionOutputs
from transformerfam.training.step.lessons import LessonStore
from transformerfam.weights.models import load_base

MOST_LOGITS = 1 << 26
"""Logits that are made at a time: 268 MB in float32, and several times that with what a loss keeps of them."""


@dataclass(frozen=True)
class Lesson:
    """What the teacher had in mind over the questions and answers of one batch, or over all of its text."""

    hidden_LBQD: torch.Tensor
    """Output of every layer over the last Q tokens of each row, zeros in rows without a question."""
    is_taught_BT: torch.Tensor
    """The tokens of the batch that are compared with it, all among the last Q."""
    text_hidden_BTD: torch.Tensor | None = None
    """Hidden states after the last norm over the batch's own tokens, read with full attention; None where predictions
    are not compared."""
    head: nn.Module | None = None
    """The teacher's language-model head, which makes predictions of them."""
    attention_LND: torch.Tensor | None = None
    """Output of every layer's attention at the batch's N tokens of a weight above 0, row by row; None where they are
    not compared."""
    emphasis_BT: torch.Tensor | None = None
    """Factor of every token's weight; None is 1 everywhere."""


@dataclass(frozen=True)
class Teaching:
    """A lesson, and how much it weighs."""

    lesson: Lesson
    weight: float = 0.0
    """Weight of the distance to the teacher's hidden states."""

    def is_about(self, columns_N: torch.Tensor) -> bool:
        """Return whether any of these tokens is compared with the teacher's hidden states."""
        return bool(self.lesson.is_taught_BT[:, columns_N].any())


@dataclass(frozen=True)
class ReadsText:
    """How a teacher reads the batch's own tokens, for `loss.full_attention`."""

    near_tokens: int = 0
    """Length of the stretches that are read once more by themselves, where `far_context` is above 0."""
    far_context: float = 0.0
    """By how much a token weighs more for each nat that the text before its stretch saves."""
    store: LessonStore | None = None
    """Where what was read is kept."""


class Teacher:
    """A base model that reads with full attention and its own weights.

    It reads key and question in one piece, and the batch's own tokens where predictions are compared.
    """

    def __init__(
        self,
        base: str | PreTrainedModel,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        reads_text: ReadsText | None = None,
        attention: AttentionOutputs | None = None,
    ) -> None:
        """Take the trained model itself where its base weights are frozen, else load the base model a second time.

        Args:
            base: as `model.base` of a recipe; or a model with a memory that is read as its base, by the same weights.
            device: where a loaded one is.
            dtype: of a loaded one's weights.
            reads_text: how it reads the batch's own tokens; None: not at all.
            attention: what notes the outputs of the trained model's attention, which is `base`; None: they are not
                compared.

        Raises:
            TransformerFamError: there is no such model.
        """
        self.is_trainee = not isinstance(base, str)
        self.model: Any = base
        if isinstance(base, str):
            self.model, _ = load_base(base)
            self.model.eval().to(device, dtype)
            self.model.requires_grad_(False)
        assert attention is None or self.is_trainee
        self.reads_text, self.attention = reads_text, attention
        self._common_ids_T: torch.Tensor | None = None
        self._common: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Callable[..., Any]]:
        """Give the forward of the base's decoder."""
        if self.is_trainee:
            with as_base(self.model) as read:
                yield read
        else:
            yield self.model.get_decoder()

    @property
    def _head(self) -> nn.Module:
        return head_of_base(self.model)

    @property
    def weights(self) -> str:
        """Digest of the weights that it reads with."""
        return digest_tensors({name: value for name, value in self.model.named_parameters() if not value.requires_grad})

    @torch.no_grad()
    def read(self, batch: Batch) -> Lesson | None:
        """Return the lesson for a batch, None where there is no question and no text is compared."""
        has_question = batch.teacher_ids_NT is not None and batch.is_taught_BT is not None
        if not has_question and self.reads_text is None:
            return None
        with self._reading() as read:
            about_text = {} if self.reads_text is None else self._read_text(read, batch, self.reads_text)
            if not has_question:
                is_taught_BT = torch.zeros_like(batch.is_key_BT)
                return Lesson(torch.zeros(0, len(batch.keys), 0, 0), is_taught_BT, head=self._head, **about_text)
            hidden_LBQD = self._read_questions(read, batch)
        assert batch.is_taught_BT is not None
        return Lesson(hidden_LBQD, batch.is_taught_BT, head=self._head, **about_text)

    def _read_text(self, read: Callable[..., Any], batch: Batch, how: ReadsText) -> dict[str, torch.Tensor]:
        """Read the batch's own tokens, and return the fields of a lesson that are about them."""

        def hidden_of(ids_BT: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = read(ids_BT.to(self.model.device), use_cache=False).last_hidden_state
            return hidden

        found, ids_BT = {}, batch.input_ids_BT
        if self.attention is not None:
            with self.attention.noted() as noted:
                text_hidden_BTD = hidden_of(ids_BT)
            rows, columns = (batch.weights_BT > 0).nonzero(as_tuple=True)
            found["attention_LND"] = torch.stack([noted[i][rows, columns] for i in sorted(noted)])
        else:
            text_hidden_BTD = _kept(how.store, "full", ids_BT, hidden_of)
        if how.far_context > 0:
            in_stretches = lambda ids: _in_stretches(ids, how.near_tokens, hidden_of)  # noqa: E731
            near_BTD = _kept(how.store, f"near-{how.near_tokens}", ids_BT, in_stretches)
            found["emphasis_BT"] = 1 + how.far_context * self._saved(batch, text_hidden_BTD, near_BTD)
        return found | {"text_hidden_BTD": text_hidden_BTD}

    def _saved(self, batch: Batch, full_BTD: torch.Tensor, near_BTD: torch.Tensor) -> torch.Tensor:
        """Return the nats that the text before a token's stretch saves, at least 0; 0 for tokens without a weight."""
        rows, columns = (batch.weights_BT > 0).nonzero(as_tuple=True)
        saved_BT = torch.zeros(batch.weights_BT.shape)
        length = slice_length(self.model)
        for part in zip(rows.split(length), columns.split(length), strict=True):
            labels_N = batch.labels_BT[part].to(self.model.device)
            full_N, near_N = (
                nn.functional.cross_entropy(self._head(hidden_BTD[part]).float(), labels_N, reduction="none")
                for hidden_BTD in (full_BTD, near_BTD)
            )
            saved_BT[part] = (near_N - full_N).clamp(min=0).cpu()
        return saved_BT

    def _read_questions(self, read: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Return the output of every layer over question and answer, `(L, B, Q, D)`."""
        assert batch.teacher_ids_NT is not None
        assert batch.is_taught_BT is not None
        num_taught = int(batch.is_taught_BT.any(dim=0).sum()) + 1  # the last token predicts nothing
        ids_NT = batch.teacher_ids_NT
        num_common = _num_common(ids_NT[:, :-num_taught])
        cache = self._cache_behind(read, ids_NT[0, :num_common], len(ids_NT))
        rest_NT = ids_NT[:, num_common:].to(self.model.device)
        output = read(rest_NT, output_hidden_states=True, use_cache=True, **as_cache(cache))
        tails_LNQD = torch.stack([layer[:, -num_taught:] for layer in output.hidden_states[1:]])
        lesson_LBQD = tails_LNQD.new_zeros(len(tails_LNQD), len(batch.keys), *tails_LNQD.shape[2:])
        lesson_LBQD[:, batch.is_key_BT.any(dim=1)] = tails_LNQD
        return lesson_LBQD

    def _cache_behind(self, read: Callable[..., Any], ids_T: torch.Tensor, num_rows: int) -> DynamicCache:
        """Return the cache of so many rows after tokens that they all begin with, read once and kept for later."""
        if self._common_ids_T is None or not torch.equal(ids_T, self._common_ids_T):
            begun = DynamicCache(config=self.model.config)
            if len(ids_T):
                read(ids_T[None].to(self.model.device), use_cache=True, **as_cache(begun))
            self._common_ids_T = ids_T
            self._common = [(layer.keys, layer.values) for layer in begun.layers] if len(ids_T) else []
        cache = DynamicCache(config=self.model.config)
        for layer_idx, kept in enumerate(self._common):
            cache.update(*(tensor.expand(num_rows, -1, -1, -1) for tensor in kept), layer_idx)
        return cache


def slice_length(model: Any) -> int:
    """Return at how many positions a model makes logits at a time."""
    return max(1, MOST_LOGITS // int(model.config.get_text_config().vocab_size))


def _kept(
    store: LessonStore | None, kind: str, ids_BT: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return hidden states `(B, T, D)` of tokens, read now or taken from the store."""
    return read(ids_BT) if store is None else store.take(kind, ids_BT, read)


def _in_stretches(ids_BT: torch.Tensor, length: int, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the hidden states of tokens that see no token before their own stretch of so many."""
    num_rows, num_tokens = ids_BT.shape
    padded_BT = nn.functional.pad(ids_BT, (0, -num_tokens % length))
    hidden_NSD = read(padded_BT.reshape(-1, length))
    return hidden_NSD.reshape(num_rows, -1, hidden_NSD.shape[-1])[:, :num_tokens]


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
