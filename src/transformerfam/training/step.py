"""What a training step reads, and what its FAM reads on until the next, as a recipe asks for it."""

import torch
from transformers import PreTrainedModel

from transformerfam.state import FamState
from transformerfam.training.blocks import run_batch
from transformerfam.training.packed import run_packed_batch, update_by_stored
from transformerfam.training.recipe import Recipe
from transformerfam.training.scores import StepOutput
from transformerfam.training.sequences import Batch, SequenceBuilder
from transformerfam.training.stored_filler import StoredFiller
from transformerfam.training.teacher import Lesson


def run_step(
    model: PreTrainedModel,
    batch: Batch,
    state: FamState,
    recipe: Recipe,
    stored: StoredFiller | None,
    lesson: Lesson | None,
    num_repeats: int,
) -> StepOutput:
    """Read a batch, packed where it was written on stored filler, else block after block.

    Args:
        model: the converted model.
        batch: what is read and predicted.
        state: where reading starts; it is not changed.
        recipe: weights of the losses, and what is kept for the backward pass.
        stored: the filler on which the batch was written; None where it has its own.
        lesson: what the teacher had in mind; None without a teacher.
        num_repeats: repeated updates of a batch with its own filler.
    """
    if stored is not None:
        return run_packed_batch(
            model,
            batch,
            state,
            stored,
            pass_before_question=recipe.state_passing.before_question,
            lesson=lesson,
            teacher_weight=recipe.loss.teacher,
        )
    return run_batch(
        model,
        batch,
        state,
        checkpoint_blocks=recipe.schedule.checkpoint_blocks,
        pass_before_question=recipe.state_passing.before_question,
        fam_change_weight=recipe.loss.fam_change,
        gradient_tokens=recipe.schedule.gradient_tokens,
        lesson=lesson,
        teacher_weight=recipe.loss.teacher,
        num_repeats=num_repeats,
    )


@torch.no_grad()
def read_on(
    model: PreTrainedModel,
    fam_LBFD: torch.Tensor,
    sequences: SequenceBuilder,
    step: int,
    num_blocks: int,
    stored: StoredFiller | None,
) -> torch.Tensor:
    """Let a saved FAM read some blocks of filler, stored ones where there are any.

    Args:
        model: the converted model.
        fam_LBFD: the FAM.
        sequences: what the filler is taken from.
        step: number of the step, which decides on the filler.
        num_blocks: how many blocks.
        stored: stored filler; None reads the blocks themselves.

    Returns:
        The FAM behind them.
    """
    if stored is not None:
        sources = sequences.sources(step, "between", len(stored.ids_NT), num_blocks)
        return torch.stack(update_by_stored(model, list(fam_LBFD), stored, sources))
    state = model.init_state(fam_LBFD.shape[1], fam=fam_LBFD)
    return model.read(sequences.filler(step, num_blocks * model.fam_config.block_size), state).fams
