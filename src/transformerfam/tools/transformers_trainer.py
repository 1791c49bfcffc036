"""The paper's training in transformers' own Trainer: the same sequences, losses and passed states as `fam train`."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer

from transformerfam.errors import RecipeError
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
    """transformers' Trainer on a recipe with instructions, for its callbacks, trackers and arguments.

    A step is that of `fam train`, and so is the first model, drawn by the recipe's seed; the loop is transformers'.
    Model, data, loss, state passing and position offset come from the recipe; optimizer, learning rates, precision,
    logging and checkpoints from `args`. What else a recipe asks of the loop is refused by name. The saved FAM of state
    passing is not in its checkpoints: a resumed run starts a new chain.
    """

    def __init__(self, recipe: Recipe, args: Any, **options: Any) -> None:
        """Build model and data.

        Args:
            recipe: with an `instructions` section.
            args: `TrainingArguments`; keep `remove_unused_columns` False.
            **options: go on to the Trainer; `model` takes the place of the recipe's.

        Raises:
            RecipeError: the recipe has no instructions, or asks for what the loop of `fam train` alone does; `args`
                would drop the weights; or there are several processes.
        """
        if recipe.instructions is None:
            raise RecipeError(
                "the recipe has no instructions section, required for transformers' Trainer; use fam train"
            )
        if args.remove_unused_columns:
            raise RecipeError("args.remove_unused_columns is True, which drops the weights; set it to False")
        if args.world_size > 1:
            raise RecipeError(
                f"there are {args.world_size} processes, whose gradients MemoryTrainer would not average: it reads "
                "block after block and not through the Trainer's wrapped model; use accelerate launch with fam train"
            )
        _require_plain_loop(recipe)
        self.recipe = recipe
        with RandomNumbers(recipe.schedule.seed).in_force():
            model, tokenizer = build_trainee(recipe)
        self.start_ids = start_ids(tokenizer)
        model = options.pop("model", model)
        self.auxiliary = auxiliary_losses(model, recipe)
        self.passing = StatePassing(recipe.state_passing, recipe.schedule.seed)
        self.passing.update_start(0, 0)
        num_sequences = recipe.schedule.steps * recipe.schedule.batch_size
        dataset = PackedDataset(PackedInstructions(recipe, tokenizer), num_sequences)
        own = {"model": model, "args": args, "train_dataset": dataset, "processing_class": tokenizer}
        super().__init__(**own | options)

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


def _require_plain_loop(recipe: Recipe) -> None:
    """Refuse what `fam train` does between steps, and transformers' loop would leave out.

    Raises:
        RecipeError: with the first such field.
    """
    asked = {
        "key_bias": recipe.key_bias is not None,
        "schedule.block_sizes": bool(recipe.schedule.block_sizes),
        "schedule.accumulate": recipe.schedule.accumulate > 1,
        "optimizer.average_decay": bool(recipe.optimizer.average_decay),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise RecipeError(
                f"the recipe has {name}, which the loop of transformers' Trainer does not do; leave it out, or use fam "
                "train"
            )
