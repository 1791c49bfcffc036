"""What a training step reads, and what its FAM reads before the next one, as the recipe says."""

import math
import random

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.layouts import inverse_frequencies
from transformerfam.decoder.state import ReadingState
from transformerfam.tasks.batch import Batch
from transformerfam.training.data.sequences import SequenceBuilder
from transformerfam.training.recipe.recipe import Recipe
from transformerfam.training.state_passing import SavedFam, StatePassing
from transformerfam.training.step.attention_outputs import AttentionOutputs
from transformerfam.training.step.attention_teaching import AttentionTeaching
from transformerfam.training.step.auxiliary import AuxiliaryLosses
from transformerfam.training.step.blocks import run_batch
from transformerfam.training.step.packed import run_packed_batch, update_by_stored
from transformerfam.training.step.parts import FamChange, GradientCut, RepeatedUpdates, StepPart
from transformerfam.training.step.scores import StepOutput
from transformerfam.training.step.stored_filler import StoredFiller
from transformerfam.training.step.teacher import Lesson, Teaching


def position_offset(model: PreTrainedModel, seed: int, step: int) -> int:
    """Draw the position offset of a step: 0 half of the time, else up to the longest wavelength of RoPE (B.2.2)."""
    draw = random.Random(f"{seed}/offset/{step}")
    slowest = min(float(table.min()) for table in inverse_frequencies(model.get_decoder().rotary_emb))
    return 0 if draw.random() < 0.5 else draw.randint(0, int(2 * math.pi / slowest))


def start_state(
    model: PreTrainedModel,
    recipe: Recipe,
    passing: StatePassing,
    step: int,
    batch: Batch,
    saved: SavedFam | None,
    rows: slice = slice(None),
) -> ReadingState:
    """Return the state that a step starts from.

    Args:
        model: the converted model.
        recipe: for the position offset.
        passing: which rows start from a saved FAM.
        step: number of the step.
        batch: what will be read.
        saved: the saved FAM of these rows, None where the step starts from the initial one.
        rows: rows of the batch that are read here; all of them if not given.
    """
    is_moved = recipe.schedule.random_position_offset
    offset = position_offset(model, recipe.schedule.seed, step) if is_moved else 0
    num_rows = len(batch.keys[rows])
    if saved is None:
        return model.init_state(num_rows, position_offset=offset)
    is_saved = passing.rows_from_saved(step, batch.is_told_B)[rows]
    return model.init_state(num_rows, saved.fam_LBFD, offset, is_saved)


def run_step(
    model: PreTrainedModel,
    batch: Batch,
    state: ReadingState,
    recipe: Recipe,
    stored: StoredFiller | None,
    lesson: Lesson | None,
    num_repeats: int,
    auxiliary: AuxiliaryLosses | None = None,
    attention: AttentionOutputs | None = None,
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
        auxiliary: further losses; None is none.
        attention: what notes the outputs of the model's attention, where they are compared with the teacher's.
    """
    teaching = None if lesson is None else Teaching(lesson, recipe.loss.teacher)
    pass_before_question = recipe.state_passing.before_question
    if stored is not None:
        return run_packed_batch(
            model, batch, state, stored, pass_before_question=pass_before_question, teaching=teaching
        )
    parts = parts_of(recipe, num_repeats, auxiliary)
    if attention is not None and lesson is not None and lesson.attention_LND is not None:
        parts.append(AttentionTeaching(attention, lesson.attention_LND, batch, recipe.loss.attention_outputs))
    return run_batch(
        model,
        batch,
        state,
        parts,
        checkpoint_blocks=recipe.schedule.checkpoint_blocks,
        pass_before_question=pass_before_question,
        teaching=teaching,
    )


def parts_of(recipe: Recipe, num_repeats: int, auxiliary: AuxiliaryLosses | None) -> list[StepPart]:
    """Return what a recipe adds to a step; arguments are those of `run_step`."""
    parts: list[StepPart] = []
    if recipe.schedule.gradient_tokens is not None:
        parts.append(GradientCut(recipe.schedule.gradient_tokens))
    if auxiliary is not None:
        parts.append(auxiliary)
    if num_repeats > 0:
        parts.append(RepeatedUpdates(num_repeats))
    if recipe.loss.fam_change > 0:
        parts.append(FamChange(recipe.loss.fam_change))
    return parts


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
        The FAM after them.
    """
    if stored is not None:
        sources = sequences.sources(step, "between", len(stored.ids_NT), num_blocks)
        return torch.stack(update_by_stored(model, list(fam_LBFD), stored, sources))
    state = model.init_state(fam_LBFD.shape[1], fam_LBFD)
    return model.read(sequences.filler(step, num_blocks * state.config.block_size), state).carried
