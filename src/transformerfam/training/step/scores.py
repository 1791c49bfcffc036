"""What a training step gives: losses over weighed tokens, right keys, and the FAM that is passed on."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from transformerfam.tasks.batch import Batch
from transformerfam.training.step.teacher import (
    Lesson,
    Teaching,
    distance_to_teacher,
    divergence_from_teacher,
    slice_length,
)


@dataclass
class StepOutput:
    """What a pass over one batch gives."""

    loss: torch.Tensor
    """Weighted sum over all positions, with the graph."""
    key_loss: torch.Tensor
    """Mean cross-entropy of the key's tokens, 0 without a question."""
    is_right_B: torch.Tensor
    """Whether every token of the row's key has the largest logit; True where the row has no question."""
    passed_fam_LBFD: torch.Tensor | None
    """The FAM to pass on, detached; None where there is none."""
    num_passed_blocks: int
    """Blocks of this batch that the passed FAM has read: with 0 it holds nothing of this batch."""
    teacher_loss: torch.Tensor
    """Mean distance to the teacher over questions and answers, detached; 0 without one."""
    fam_change: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Mean change of the FAM, relative to its length, over the updates that `FamChange` looks at, detached; 0
    where there is none."""

    attention_distance: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Weighed mean distance of attention's outputs from the teacher's, detached; 0 where they are not compared."""

    @property
    def fam_norm(self) -> float | None:
        """Root mean square of the passed FAM's rows, the largest of all layers; None where there is none."""
        fam_LBFD = self.passed_fam_LBFD
        return None if fam_LBFD is None else float(fam_LBFD.float().pow(2).mean(-1).sqrt().mean((1, 2)).max())

    def measured(self, batch: Batch) -> dict[str, float | None]:
        """Return what the log has of it, by name."""
        asks_B = batch.is_key_BT.any(dim=1)
        return {
            "loss": self.loss.item(),
            "key_loss": self.key_loss.item() if bool(asks_B.any()) else None,
            "key_accuracy": self.accuracy_of(asks_B),
            "key_accuracy_asked_later": self.accuracy_of(asks_B & ~batch.is_told_B),
            "fam_norm": self.fam_norm,
            "teacher_loss": self.teacher_loss.item(),
            "attention_distance": self.attention_distance.item(),
            "fam_change": self.fam_change.item(),
        }

    def accuracy_of(self, is_counted_B: torch.Tensor) -> float | None:
        """Return the share of the counted rows whose key is right; None where no row counts."""
        is_right_N = self.is_right_B[is_counted_B]
        return is_right_N.float().mean().item() if is_right_N.numel() else None


@dataclass
class Scores:
    """Parts of a step's output, summed up over blocks; the losses are sums over tokens."""

    loss: torch.Tensor
    key_loss: torch.Tensor
    num_wrong_B: torch.Tensor
    teacher_loss: torch.Tensor

    @classmethod
    def zero(cls, batch_size: int, device: torch.device) -> "Scores":
        """Return the scores of nothing."""
        zero = torch.zeros((), device=device)
        return cls(zero, zero, torch.zeros(batch_size, dtype=torch.long, device=device), zero)

    def __add__(self, other: "Scores") -> "Scores":
        """Return the scores of both."""
        return Scores(
            self.loss + other.loss,
            self.key_loss + other.key_loss,
            self.num_wrong_B + other.num_wrong_B,
            self.teacher_loss + other.teacher_loss,
        )

    def output(
        self,
        batch: Batch,
        teaching: Teaching | None,
        passed_fam_LBFD: torch.Tensor | None,
        num_passed_blocks: int,
    ) -> StepOutput:
        """Return the output of a step whose blocks are all summed up here."""
        num_taught = 1 if teaching is None else max(1, int(teaching.lesson.is_taught_BT.sum()))
        teacher_loss = self.teacher_loss / num_taught
        return StepOutput(
            loss=self.loss + (0.0 if teaching is None else teaching.weight) * teacher_loss,
            key_loss=self.key_loss.detach() / batch.is_key_BT.sum().clamp(min=1),
            is_right_B=(self.num_wrong_B == 0).cpu(),
            passed_fam_LBFD=passed_fam_LBFD,
            num_passed_blocks=num_passed_blocks,
            teacher_loss=teacher_loss.detach(),
        )


def score(
    model: PreTrainedModel,
    batch: Batch,
    columns_N: torch.Tensor,
    last_hidden_BND: torch.Tensor,
    hidden_states: tuple[torch.Tensor, ...] | None,
    teaching: Teaching | None,
) -> Scores:
    """Score what a model predicts at some tokens of a batch.

    Logits are made for the weighed positions alone, since all of them would be the largest tensor of the step; where
    these are more than `MOST_LOGITS` numbers, slice by slice, each made once more for its gradient.

    Args:
        model: the model, for its head.
        batch: the batch.
        columns_N: the tokens.
        last_hidden_BND: the last hidden states there.
        hidden_states: those of the embedding and of every layer, None where nothing is compared with the teacher.
        teaching: what the teacher had in mind; None without a teacher.
    """
    lesson = None if teaching is None else teaching.lesson
    weights_BN = batch.weights_BT[:, columns_N]
    if lesson is not None and lesson.emphasis_BT is not None:
        weights_BN = weights_BN * lesson.emphasis_BT[:, columns_N]
    device = last_hidden_BND.device
    scores = Scores.zero(len(weights_BN), device)
    if lesson is not None and hidden_states is not None:
        scores.teacher_loss = distance_to_teacher(lesson, hidden_states, columns_N)
    rows, places = (weights_BN > 0).nonzero(as_tuple=True)
    if len(rows) == 0:
        return scores
    length = slice_length(model)
    for part_rows, part_places in zip(rows.split(length), places.split(length), strict=True):
        columns = columns_N[part_places]
        is_key = batch.is_key_BT[part_rows, columns].to(device)
        given = (
            model.get_output_embeddings(),
            last_hidden_BND[part_rows, part_places],
            batch.labels_BT[part_rows, columns].to(device),
            is_key,
            lesson,
            part_rows,
            columns,
        )
        if len(rows) > length:
            losses, is_wrong = checkpoint(_losses, *given, use_reentrant=False)
        else:
            losses, is_wrong = _losses(*given)
        scores.num_wrong_B = scores.num_wrong_B.index_add(0, part_rows.to(device), is_wrong.long())
        scores.loss = scores.loss + (losses * weights_BN[part_rows, part_places].to(device)).sum()
        scores.key_loss = scores.key_loss + losses.detach()[is_key].sum()
    return scores


def _losses(
    head: nn.Module,
    hidden_ND: torch.Tensor,
    labels_N: torch.Tensor,
    is_key_N: torch.Tensor,
    lesson: Lesson | None,
    rows_N: torch.Tensor,
    columns_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each prediction, and whether it is a token of a key and wrong: `(N,)` each."""
    logits_NV = head(hidden_ND).float()
    losses_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    if lesson is not None and lesson.text_hidden_BTD is not None and not bool(is_key_N.all()):
        others = (~is_key_N).nonzero()[:, 0]
        away = divergence_from_teacher(lesson, logits_NV[others], rows_N[others.cpu()], columns_N[others.cpu()])
        losses_N = losses_N.index_put((others,), away)
    return losses_N, (logits_NV.detach().argmax(dim=-1) != labels_N) & is_key_N
