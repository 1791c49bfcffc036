"""Back-propagation through all blocks of a sequence, with the activations of one block in memory.

Each block is a pure function: state tensors and token ids in, a part of the loss and new state tensors out. Its
activations are computed again when the gradient comes back to it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from transformerfam.decoder.served import decoder_layers
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError
from transformerfam.tasks.batch import Batch
from transformerfam.training.step.parts import Block, StepPart
from transformerfam.training.step.scores import Scores, StepOutput, score
from transformerfam.training.step.teacher import Teaching

BLOCKS_PER_TRIM = 4
TRY_AGAIN = (
    "lower optimizer.lr, optimizer.clip_norm or the weights of loss, or set fam.fam_norm_bound, and train into another "
    "folder, since a run is resumed by its own recipe alone"
)
"""What to do about numbers that are not finite."""


def run_batch(
    model: PreTrainedModel,
    batch: Batch,
    state: ReadingState,
    parts: Sequence[StepPart] = (),
    *,
    checkpoint_blocks: bool = True,
    pass_before_question: bool = False,
    teaching: Teaching | None = None,
) -> StepOutput:
    """Read a batch block after block and sum up its loss, the graph kept from the first block to the last.

    Args:
        model: the converted model.
        batch: what is read and predicted.
        state: where reading starts; it is not changed.
        parts: what else is done, in this order.
        checkpoint_blocks: compute each block again in the backward pass instead of keeping its activations.
        pass_before_question: the FAM that is passed on is the one in front of the block in which the question begins,
            which in the first block is that of `state`; else it is that of the last whole block.
        teaching: what the teacher had in mind; None without a teacher.

    Returns:
        The loss with its graph, and what the log shows.

    Source: section 2.1, "training long inputs runs block after block with gradient checkpointing".
    """
    scores, block_size = Scores.zero(len(batch.keys), model.device), state.config.block_size
    passed = state.carried.detach() if state.has_memory and pass_before_question else None
    num_passed_blocks, given, notes = 0, [], []
    for block_idx, (start, stop) in enumerate(block_spans(batch.input_ids_BT.shape[1], block_size)):
        is_whole = stop - start == block_size
        block = Block(start, stop, is_whole, is_whole and stop <= batch.question_start)
        first = start
        for part in parts:
            state, begun = part.enter(model, state, batch, block)
            first = max(first, begun)
        notes.append([part.note(state, batch, block) for part in parts])
        arguments = (model, state, batch, first, stop, parts, notes[-1], teaching)
        state, block_scores, block_given = (
            checkpoint(_run_block, *arguments, use_reentrant=False, preserve_rng_state=_drops(model))
            if checkpoint_blocks
            else _run_block(*arguments)
        )
        if checkpoint_blocks and model.device.type == "cpu" and block_idx % BLOCKS_PER_TRIM == BLOCKS_PER_TRIM - 1:
            _return_freed_memory(state)
        scores = scores + block_scores
        given.append(block_given)
        for part in parts:
            state = part.leave(model, state, batch, block)
        if state.has_memory and (block.is_before_question if pass_before_question else is_whole):
            passed = state.carried.detach()
            num_passed_blocks += 1
    output = scores.output(batch, teaching, passed, num_passed_blocks)
    for number, part in enumerate(parts):
        own = [value for value in (block_given[number] for block_given in given) if value is not None]
        output = part.finish(output, own, [block_notes[number] for block_notes in notes])
    return output


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
    parts: Sequence[StepPart],
    notes: Sequence[Any],
    teaching: Teaching | None,
) -> tuple[ReadingState, Scores, list[torch.Tensor | None]]:
    """Read one block; the state that comes in stays as it is.

    Where no part needs it, the new state of a complete block does not hold its keys and values: most of what would be
    kept between two blocks.

    Returns:
        The new state, the scores of the block, and what every part gives.
    """
    for part in parts:
        part.begin()
    before, state = state, state.shallow_copy()
    state.make_room()
    columns = torch.arange(start, stop)
    asks_teacher = teaching is not None and teaching.is_about(columns)
    output = model.get_decoder()(
        input_ids=batch.input_ids_BT[:, columns].to(model.device),
        past_key_values=state,
        output_hidden_states=asks_teacher,
    )
    scores = score(model, batch, columns, output.last_hidden_state, output.hidden_states, teaching)
    pairs = zip(parts, notes, strict=True)
    given = [part.within(before, state, output.last_hidden_state, note) for part, note in pairs]
    for layer in state.layers:
        layer.fam_before_bound = None
    if not any(part.needs_block for part in parts):
        state.drop_complete_block()
    return state, scores, given


def _return_freed_memory(state: ReadingState) -> None:
    """Let the allocator return freed memory to the system, now and again when the gradient has come back to here.

    The small tensors that are kept for every block lie between large ones that were freed. Without this glibc grows by
    as much as a block's activations with every block, though they are gone.
    """
    if not hasattr(psutil, "heap_trim"):  # an allocator without this call
        return

    def trim(_: torch.Tensor) -> None:
        psutil.heap_trim()

    psutil.heap_trim()
    carried = state.first_carried  # the last to get its gradient
    if carried is not None and carried.requires_grad:
        carried.register_hook(trim)


def _drops(model: nn.Module) -> bool:
    """Return whether the model draws random numbers, so that recomputing must draw the same ones again."""
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
    return "the language-model head, after the last layer"


def find_non_finite_gradient(model: nn.Module) -> str:
    """Return the name of the first parameter whose gradient is not finite, or what is where each one is finite."""
    names = (
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    )
    return next(names, "all parameters together, whose length float32 does not hold,")
