"""Evaluation while training, on held-out texts and questions, and the weights of the best step."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from transformerfam.decoder.memory import memory_of, set_configuration
from transformerfam.errors import CorruptFileError, RecipeError
from transformerfam.files.tensors import load_tensors, metadata_form, save_tensors
from transformerfam.reports.answers import worth
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import AnswersEvaluation
from transformerfam.tasks.next_token import token_losses
from transformerfam.tasks.text import files_of
from transformerfam.training.data.instructions import PackedInstructions
from transformerfam.training.optimizer import AverageOfWeights
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.sharding import shared_like, whole
from transformerfam.weights.folders import BEST_FILE, BEST_KIND

FORMAT_VERSION = 1
LOSS, SCORE = "validation_loss", "validation_score"


class Validation:
    """What a recipe's section `evaluation` measures, and keeps.

    Raises:
        RecipeError: a text cannot be read.
        TransformerFamError: the questions cannot be read, or the tokenizer knows too little of a text.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        self.section, self.tokenizer = recipe.evaluation, tokenizer
        self.num_steps = recipe.schedule.steps
        self.batch_size = recipe.schedule.batch_size
        self.reading_config = recipe.reading_config if recipe.rival is None else None
        self.best: float | None = None
        self.notes: dict[str, Any] = {}
        """What the trained memory's notes say of it."""
        self.texts: PackedInstructions | None = None
        self.questions: QuestionFile | None = None
        if self.section is None:
            return
        if self.section.files:
            assert recipe.instructions is not None
            changed: dict[str, Any] = {"files": self.section.files, "repeat_tokens": 0, "mix_sequences": True}
            changed |= {"sampled_tokens": None, "early_share": 0.0}
            instructions = recipe.instructions.model_copy(update=changed)
            held_out = recipe.model_copy(update={"instructions": instructions})
            _require_held_out(recipe)
            self.texts = PackedInstructions(held_out, tokenizer, "evaluation.files")
        if self.section.questions is not None:
            self.questions = QuestionFile(self.section.questions)

    @property
    def kept_by(self) -> str:
        """What the kept weights are best by: "loss" or "score"; "last": they are those of the last step."""
        return "last" if self.section is None else self.section.kept_by

    def is_due(self, num_steps: int) -> bool:
        """Say whether to measure after so many steps."""
        return self.section is not None and (num_steps % self.section.every == 0 or num_steps == self.num_steps)

    def measure(self, model: nn.Module, average: AverageOfWeights) -> dict[str, float]:
        """Return what is measured, by its name in the log.

        Args:
            model: what is trained; it is left as it was.
            average: its averaged weights, which are measured in place of the last ones where there are any.
        """
        found = {}
        with _averaged(model, average), self._as_it_will_be_read(model):
            if self.texts is not None:
                found[LOSS] = self._loss(model, self.texts)
            if self.questions is not None:
                found[SCORE] = self._score(model, self.questions)
        return found

    @contextlib.contextmanager
    def _as_it_will_be_read(self, model: Any) -> Iterator[None]:
        """Let a model have the mode and the configuration of reading, and then those of training again."""
        was_training, config = model.training, memory_of(model).config
        model.eval()
        if self.reading_config is not None:
            set_configuration(model, self.reading_config)
        try:
            yield
        finally:
            if self.reading_config is not None:
                set_configuration(model, config)
            model.train(was_training)

    def keep_best(
        self, folder: Path | None, model: nn.Module, average: AverageOfWeights, num_steps: int, found: dict[str, float]
    ) -> None:
        """Write the weights that were measured, if they are the best; every process must call it.

        Args:
            folder: of the run; None in a process that does not write.
            model: what is trained.
            average: its averaged weights.
            num_steps: steps that were done.
            found: what `measure` returned.
        """
        if self.kept_by == "last":
            return
        value = found[LOSS] if self.kept_by == "loss" else -found[SCORE]
        if not value < (math.inf if self.best is None else self.best):  # what is not finite is never the best
            return
        self.best = value
        with _averaged(model, average):
            tensors = {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
        if folder is not None:
            notes = {"step": num_steps, "value": value, "measured": found}
            save_tensors(
                folder / BEST_FILE, tensors, {"kind": BEST_KIND, "format_version": FORMAT_VERSION, "best": notes}
            )

    def restore(self, folder: Path) -> None:
        """Continue with the best weights of a run that resumes.

        A run that was killed may have left those of a later step, which is done and measured again.

        Raises:
            CorruptFileError: their file cannot be read.
        """
        if (folder / BEST_FILE).exists():
            _, best = _read_best(folder)
            self.best = best["value"]

    def load_best(self, folder: Path, model: nn.Module) -> bool:
        """Put the best weights into the model; False: the recipe keeps the last ones, or none were measured.

        Raises:
            CorruptFileError: their file cannot be read.
        """
        if self.kept_by == "last" or not (folder / BEST_FILE).exists():
            return False
        tensors, best = _read_best(folder)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in trained.items()}:
            raise CorruptFileError(
                f"{folder / BEST_FILE} holds other weights than those that are trained here; train into another folder"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(shared_like(tensors[name], parameter))
        self.notes = {"best": {"step": best["step"], **best["measured"]}}
        return True

    def _loss(self, model: nn.Module, texts: PackedInstructions) -> float:
        """Return the loss of the sequences, weighed as they are in training."""
        assert self.section is not None
        total, weight, num_sequences = 0.0, 0.0, self.section.num_sequences
        for first in range(0, num_sequences, self.batch_size):
            numbers = range(first, min(first + self.batch_size, num_sequences))
            ids, weights = zip(*(texts.sequence(number) for number in numbers), strict=True)
            loss_BT, _, _ = token_losses(model, torch.stack(ids))
            weights_BT = torch.stack(weights)[:, 1:]
            total += float((loss_BT * weights_BT).sum())
            weight += float(weights_BT.sum())
        return total / max(weight, 1e-9)

    def _score(self, model: nn.Module, questions: QuestionFile) -> float:
        evaluation = AnswersEvaluation(questions=questions, batch_size=self.batch_size)
        return mean(worth(row) for row in evaluation.rows(model, self.tokenizer))


def _read_best(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the best weights, and their step, value and all that was measured."""
    path = folder / BEST_FILE
    tensors, metadata = load_tensors(path, BEST_KIND, FORMAT_VERSION)
    with metadata_form(path, BEST_KIND):
        best = metadata["best"]
        return tensors, {"step": int(best["step"]), "value": float(best["value"]), "measured": dict(best["measured"])}


def _require_held_out(recipe: Recipe) -> None:
    """Refuse a held-out text that is trained on, by whatever path."""
    trained, held_out = ({path.resolve() for path in files_of(names, key)} for key, names in recipe.text_files.items())
    if both := sorted(trained & held_out):
        raise RecipeError(f"evaluation.files has {both[0]}, which instructions.files has, too; hold out another text")


@contextlib.contextmanager
def _averaged(model: nn.Module, average: AverageOfWeights) -> Iterator[None]:
    """Let a model have its averaged weights, where there are any, and then its own again."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in average.values}
    average.copy_to(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in before:
                    parameter.copy_(before[name])
