"""A judge of the training loop: a recipe with instructions in the loop of transformers' own Trainer."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from transformerfam.tasks.text import start_ids
from transformerfam.training.data.instructions import PackedInstructions, weighed_batch
from transformerfam.training.random_numbers import RandomNumbers
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.setup import build_trainee
from transformerfam.training.state_passing import StatePassing
from transformerfam.training.step.auxiliary import auxiliary_losses
from transformerfam.training.step.step import run_step, start_state


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """The packed sequences of a recipe, one after the other, as many as its steps take."""

    def __init__(self, sequences: PackedInstructions, num_sequences: int) -> None:
        self.sequences = sequences
        self.num_sequences = num_sequences

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.num_sequences

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Return tokens and weights, each `(length,)`."""
        ids, weights = self.sequences.sequence(number)
        return {"input_ids": ids, "weights": weights}


class MemoryTrainer(Trainer):
    """transformers' Trainer on a recipe with instructions.

    Model, data, loss, state passing and position offset come from the recipe; optimizer, learning rates and the loop
    from `args`, whose `remove_unused_columns` has to be False.
    """

    def __init__(self, recipe: Recipe, args: Any) -> None:
        self.recipe = recipe
        with RandomNumbers(recipe.schedule.seed).in_force():
            model, tokenizer = build_trainee(recipe)
        self.start_ids = start_ids(tokenizer)
        self.auxiliary = auxiliary_losses(model, recipe)
        self.passing = StatePassing(recipe.state_passing, recipe.schedule.seed)
        self.passing.update_start(0, 0)
        num_sequences = recipe.schedule.steps * recipe.schedule.batch_size
        dataset = PackedDataset(PackedInstructions(recipe, tokenizer), num_sequences)
        super().__init__(model, args, train_dataset=dataset, processing_class=tokenizer)

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        """Take the sequences in their order, which the recipe's seed has drawn."""
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Read a batch block after block, as `fam train` does, and return its loss."""
        inner: Any = self.accelerator.unwrap_model(model)
        step = self.state.global_step
        saved = self.passing.draw(step)
        batch = weighed_batch(inputs["input_ids"].cpu(), inputs["weights"].cpu())
        batch = batch.begun(self.start_ids, is_passed=saved is not None)
        state = start_state(inner, self.recipe, self.passing, step, batch, saved)
        output = run_step(inner, batch, state, self.recipe, None, None, 0, self.auxiliary)
        self.passing.keep(step, output.passed_fam_LBFD, (None,) * len(batch.keys))
        self.passing.update_start(step + 1, 0)
        return (output.loss, {}) if return_outputs else output.loss
