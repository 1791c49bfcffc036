"""Back-propagation through all blocks of a sequence, with the activations of one block in memory.

Each block is a pure function: state tensors and token ids in, a part of the loss and new state tensors out. Its
activations are computed again when the gradient comes back to it.
"""

from collections.abc import Iterator
from dataclasses import replace

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from transformerfam.decoder.positions import first_position
from transformerfam.decoder.served import decoder_layers
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.training.data.sequences import Batch
from transformerfam.training.step.auxiliary import AuxiliaryLosses
from transformerfam.training.step.scores import Scores, StepOutput, score
from transformerfam.training.step.teacher import Lesson

BLOCKS_PER_TRIM = 4


def run_batch(
    model: PreTrainedModel,
    batch: Batch,
    state: ReadingState,
    *,
    checkpoint_blocks: bool = True,
    pass_before_question: bool = False,
    fam_change_weight: float = 0.0,
    gradient_tokens: int | None = None,
    lesson: Lesson | None = None,
    teacher_weight: float = 0.0,
    num_repeats: int = 0,
    auxiliary: AuxiliaryLosses | None = None,
) -> StepOutput:
    """Read a batch block after block and sum up its loss, the graph kept from the first block to the last.

    Args:
        model: the converted model.
        batch: what is read and predicted.
        state: where reading starts; it is not changed.
        checkpoint_blocks: compute each block again in the backward pass instead of keeping its activations.
        pass_before_question: the FAM that is passed on is the one in front of the block in which the question begins,
            which in the first block is that of `state`; else it is that of the last whole block.
        fam_change_weight: weight of the change of the FAM in the updates of sequences that tell no key, in front of the
            question; a first update, which has no residual, is left out.
        gradient_tokens: tokens at the end of every whole block that are read with gradient; None is all of them.
        lesson: what the teacher had in mind; None without a teacher.
        teacher_weight: weight of the distance to it.
        num_repeats: further updates of the FAM behind every whole block in front of the question, by blocks that the
            rows without a key of their own have just read; see `_update_again`.
        auxiliary: further losses, each the mean over the blocks; None is none.

    Returns:
        The loss with its graph, and what the log shows.

    Source: section 2.1, "training long inputs runs block after block with gradient checkpointing".
    """
    scores, total_change, num_changes = Scores.zero(len(batch.keys), model.device), torch.zeros(()), 0
    block_size = state.config.block_size
    has_fam = state.has_memory
    passed = state.carried.detach() if has_fam and pass_before_question else None
    num_passed_blocks, num_blocks = 0, -(-batch.input_ids_BT.shape[1] // block_size)
    for block_idx, (start, stop) in enumerate(block_spans(batch.input_ids_BT.shape[1], block_size)):
        is_whole = stop - start == block_size
        is_before_question = is_whole and stop <= batch.question_start
        first = start
        if is_whole and gradient_tokens is not None and gradient_tokens < block_size:
            first = stop - gradient_tokens
            state = _read_without_gradient(model, state, batch.input_ids_BT[:, start:first])
        holds_B = [False] * len(batch.keys)
        if has_fam and is_before_question and fam_change_weight > 0:
            begun = zip(state.num_blocks_per_row, state.starts_from_saved_fam, batch.is_told_B.tolist(), strict=True)
            holds_B = [not is_told and (saved or num_blocks > 0) for num_blocks, saved, is_told in begun]
        arguments = (model, state, batch, first, stop, torch.tensor(holds_B), lesson, num_repeats == 0, auxiliary)
        state, piece_scores, change, added = (
            checkpoint(_run_block, *arguments, use_reentrant=False, preserve_rng_state=_drops(model))
            if checkpoint_blocks
            else _run_block(*arguments)
        )
        if checkpoint_blocks and model.device.type == "cpu" and block_idx % BLOCKS_PER_TRIM == BLOCKS_PER_TRIM - 1:
            _return_freed_memory(state)
        scores = scores + piece_scores
        scores.loss = scores.loss + added / num_blocks
        total_change, num_changes = total_change + change, num_changes + sum(holds_B)
        if has_fam and is_before_question and num_repeats > 0:
            fillers = (~batch.is_told_B).nonzero()[:, 0].tolist()
            for repeat in range(num_repeats if fillers else 0):
                sources = [fillers[(row + repeat) % len(fillers)] for row in range(len(batch.keys))]
                state = _update_again(model, state, batch.input_ids_BT[sources, stop - 1 : stop], sources)
        if has_fam and (is_before_question if pass_before_question else is_whole):
            passed = state.carried.detach()
            num_passed_blocks += 1
    output = scores.output(batch, lesson, teacher_weight, passed, num_passed_blocks)
    change = total_change / max(1, num_changes)
    return replace(output, loss=output.loss + fam_change_weight * change, fam_change=change.detach())


def block_spans(length: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Yield the first and one past the last token of every block of a sequence."""
    for start in range(0, length, block_size):
        yield start, min(start + block_size, length)


def _run_block(
    model: PreTrainedModel,
    state: ReadingState,
    batch: Batch,
    start: int,
    stop: int,
    holds_B: torch.Tensor,
    lesson: Lesson | None,
    drops_block: bool,
    auxiliary: AuxiliaryLosses | None,
) -> tuple[ReadingState, Scores, torch.Tensor, torch.Tensor]:
    """Read one block; the state that comes in stays as it is.

    With `drops_block` the new state of a complete block does not hold its keys and values: most of what would be kept
    between two blocks.

    Returns:
        The new state, the scores of the block, the change of the FAM, which should not change in rows `holds_B`, and
        what the auxiliary losses add.
    """
    if auxiliary is not None:
        auxiliary.begin()
    before, state = state, state.shallow_copy()
    state.make_room()
    columns = torch.arange(start, stop)
    asks_teacher = lesson is not None and bool(lesson.is_taught_BT[:, columns].any())
    output = model.get_decoder()(
        input_ids=batch.input_ids_BT[:, columns].to(model.device),
        past_key_values=state,
        output_hidden_states=asks_teacher,
    )
    scores = score(model, batch, columns, output.last_hidden_state, output.hidden_states, lesson)
    change = _fam_change(before, state, holds_B)
    if drops_block:
        state.drop_complete_block()
    hidden = output.last_hidden_state
    added = hidden.new_zeros(()) if auxiliary is None else auxiliary.take(hidden)
    return state, scores, change, added


def _return_freed_memory(state: ReadingState) -> None:
    """Let the allocator return freed memory to the system, now and again when the gradient has come back to here.

    The small tensors that are kept for every block lie between large ones that were freed. Without this glibc grows by
    as much as a block's activations with every block, though they are gone.
    """
    if not hasattr(psutil, "heap_trim"):  # an allocator that cannot be asked
        return

    def trim(_: torch.Tensor) -> None:
        psutil.heap_trim()

    psutil.heap_trim()
    carried = state.first_carried  # the last to get its gradient
    if carried is not None and carried.requires_grad:
        carried.register_hook(trim)


def _fam_change(before: ReadingState, after: ReadingState, holds_B: torch.Tensor) -> torch.Tensor:
    """Return the length of the FAM's change, relative to its own: mean over layers and rows, sum over `holds_B`."""
    changes = []
    for old, new in zip(before.layers, after.layers, strict=True):
        updated, new.fam_before_bound = new.fam_before_bound, None
        if updated is None or not bool(holds_B.any()):
            continue
        old_NFD = old.fam[holds_B]
        length_NF = torch.linalg.vector_norm(old_NFD.detach(), dim=-1).clamp(min=1e-6)
        change_NF = torch.linalg.vector_norm(updated[holds_B] - old_NFD, dim=-1)
        changes.append((change_NF / length_NF).mean(-1).sum())
    return torch.stack(changes).mean() if changes else torch.zeros(())


@torch.no_grad()
def _read_without_gradient(model: PreTrainedModel, state: ReadingState, ids_BT: torch.Tensor) -> ReadingState:
    """Read the first tokens of a block; keys and values are cut off the graph, the FAM is not.

    Where all rows are alike, as in front of the first key, one is read for all.

    Returns:
        A new state, whose FAM is that of `state`.
    """
    has_read = any(state.num_blocks_per_row) or any(state.block_fill) or any(state.starts_from_saved_fam)
    are_alike = not has_read and bool((ids_BT == ids_BT[:1]).all())
    after = state.select([0]) if are_alike else state.fork()
    after.make_room()
    model.get_decoder()(input_ids=(ids_BT[:1] if are_alike else ids_BT).to(model.device), past_key_values=after)
    if are_alike:
        after = after.select([0] * len(ids_BT))
    for layer, before in zip(after.layers, state.layers, strict=True):
        layer.fam = before.fam
        if state.config.has_slots and layer.fam is not None:  # tokens see the slots themselves
            with torch.enable_grad():
                layer.put(layer.sections.fam, *layer.turner.turn(*layer.slots(), first_position(state.config)))
    return after


def _update_again(
    model: PreTrainedModel, state: ReadingState, last_ids_B1: torch.Tensor, sources: list[int]
) -> ReadingState:
    """Let every row's FAM compress the block that another row has just read, for the cost of one token.

    The block's keys and values are still there and are taken as they are, without their graph; the block's last token
    alone is read again, together with the FAM. They were made with another FAM in sight than the one that now
    compresses them, which is why this is for training and not a reading.

    Args:
        model: the converted model, without memory segments.
        state: a state at the end of a block; it stays as it is.
        last_ids_B1: the last token of each row's new block.
        sources: for every row, the row whose block it gets.
    """
    after = state.shallow_copy()
    for layer in after.layers:
        block = layer.sections.block
        layer.put(block, layer.keys[sources, :, block:].detach(), layer.values[sources, :, block:].detach())
    after.block_fill = [state.config.block_size - 1] * len(sources)
    model.get_decoder()(input_ids=last_ids_B1.to(model.device), past_key_values=after)
    return after


def _drops(model: nn.Module) -> bool:
    """Say whether the model draws random numbers, so that recomputing must draw the same ones again."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


@torch.no_grad()
def find_non_finite(model: PreTrainedModel, batch: Batch, state: ReadingState) -> str:
    """Read a batch again and say where a hidden state first was not finite.

    Args:
        model: the converted model, with the weights that gave the loss.
        batch: the batch that gave it.
        state: the state that the step started from.

    Returns:
        "block b, layer l", counted from 0, or where else the fault lies.
    """
    found: list[int] = []
    handles = []
    for layer_idx, layer in enumerate(decoder_layers(model)):

        def note(module: nn.Module, args: object, output: object, layer_idx: int = layer_idx) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and not bool(torch.isfinite(hidden).all()):
                found.append(layer_idx)

        handles.append(layer.register_forward_hook(note))
    try:
        state = state.fork()
        block_size = state.config.block_size
        for block_idx, (start, stop) in enumerate(block_spans(batch.input_ids_BT.shape[1], block_size)):
            ids_BT = batch.input_ids_BT[:, start:stop].to(model.device)
            try:
                model.get_decoder()(input_ids=ids_BT, past_key_values=state)
            except TransformerFamError as error:  # the state takes nothing that is not finite
                return f"block {block_idx}, layer {found[0]}" if found else f"block {block_idx}: {error}"
            if found:
                return f"block {block_idx}, layer {found[0]}"
    finally:
        for handle in handles:
            handle.remove()
    return "the language-model head, behind the last layer"


def find_non_finite_gradient(model: nn.Module) -> str:
    """Return the name of the first parameter whose gradient is not finite, or what is where each one is finite."""
    names = (
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    )
    return next(names, "all parameters together, whose length float32 does not hold,")
