"""The forward pass of one training step, as a recipe asks for it."""

from transformers import PreTrainedModel

from transformerfam.state import FamState
from transformerfam.training.blocks import StepOutput, run_batch
from transformerfam.training.packed import run_packed_batch
from transformerfam.training.recipe import Recipe
from transformerfam.training.sequences import Batch
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
