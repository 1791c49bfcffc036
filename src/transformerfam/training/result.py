"""How a training run ended, and the trained memory that it leaves in its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformerfam.fam.memory import set_block_size, set_key_bias
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import save_model


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended."""

    folder: Path
    steps: int
    """Steps that were done, all runs together."""
    seconds: float
    is_complete: bool
    """False when it was interrupted; a checkpoint is there, and no memory yet."""
    message: str
    """One line for the user."""


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    recipe: Recipe,
    notes: Mapping[str, Any],
) -> None:
    """Write a trained memory: a whole model after full training, an adapter in float16 after LoRA.

    Args:
        model: as it was trained; bias, block size and mode become those of reading.
        tokenizer: its tokenizer.
        folder: of the run.
        recipe: of the run.
        notes: JSON values that say how it was trained.
    """
    if recipe.key_bias is not None:
        set_key_bias(model, 0.0)
    model.eval()
    if recipe.schedule.block_sizes:
        set_block_size(model, recipe.fam.block_size)
    if recipe.lora is None:
        save_model(model, tokenizer, folder, notes, recipe.reading_config)
    else:
        adapter = FamAdapter.from_model(model, notes=dict(notes))
        adapter.config = recipe.reading_config
        adapter.save_pretrained(folder, dtype=torch.float16)
