"""What a recipe adds to a training step besides the loss of its tokens, each an object that `run_batch` calls.

One more: a class here, and a line in `step.parts_of`.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.positions import first_position
from transformerfam.decoder.state import ReadingState
from transformerfam.tasks.batch import Batch
from transformerfam.training.step.scores import StepOutput


class Block(NamedTuple):
    """A block of a batch.

    Attributes:
        start: its first token.
        stop: one past its last.
        is_whole: whether it is complete.
        is_before_question: whether it is, in front of the block in which the question begins.
    """

    start: int
    stop: int
    is_whole: bool
    is_before_question: bool


class StepPart:
    """What is done around every block; each method's default is nothing.

    Attributes:
        needs_block: whether `leave` needs the block's keys and values.
    """

    needs_block = False

    def enter(
        self, model: PreTrainedModel, state: ReadingState, batch: Batch, block: Block
    ) -> tuple[ReadingState, int]:
        """Return the state in front of a block, and the first of its tokens that is read with gradient."""
        return state, block.start

    def note(self, state: ReadingState, batch: Batch, block: Block) -> Any:
        """Return what `within` is given: it runs again in the backward pass, and this does not."""
        return None

    def begin(self) -> None:
        """Forget what was seen: a block is read, for the first time or again."""

    def within(
        self, before: ReadingState, after: ReadingState, hidden_BTD: torch.Tensor, note: Any
    ) -> torch.Tensor | None:
        """Return what a block gives, with its graph; None is nothing.

        Args:
            before: the state in front of the block.
            after: the state after it.
            hidden_BTD: last hidden states of the block.
            note: what `note` gave.
        """
        return None

    def leave(self, model: PreTrainedModel, state: ReadingState, batch: Batch, block: Block) -> ReadingState:
        """Return the state that the next block starts from."""
        return state

    def finish(self, output: StepOutput, given: list[torch.Tensor], notes: list[Any]) -> StepOutput:
        """Return the output of the step with what this adds.

        Args:
            output: without it.
            given: what `within` gave, by block.
            notes: what `note` gave, by block.
        """
        return output


class GradientCut(StepPart):
    """Read the first tokens of every whole block without gradient; the FAM alone keeps its graph."""

    def __init__(self, num_tokens: int) -> None:
        """Keep the gradient of so many tokens at the end of a block."""
        self.num_tokens = num_tokens

    def enter(
        self, model: PreTrainedModel, state: ReadingState, batch: Batch, block: Block
    ) -> tuple[ReadingState, int]:
        """Read the tokens without gradient."""
        if not block.is_whole or self.num_tokens >= block.stop - block.start:
            return state, block.start
        first = block.stop - self.num_tokens
        return _read_without_gradient(model, state, batch.input_ids_BT[:, block.start : first]), first


class RepeatedUpdates(StepPart):
    """Update the FAM further after every whole block in front of the question.

    By blocks that rows without their own key have just read; see `_update_again`.
    """

    def __init__(self, number: int) -> None:
        """Update so many times."""
        self.number, self.needs_block = number, number > 0

    def leave(self, model: PreTrainedModel, state: ReadingState, batch: Batch, block: Block) -> ReadingState:
        """Update a state with memory; where every row gives a key, not at all."""
        fillers = (~batch.is_told_B).nonzero()[:, 0].tolist()
        if not state.has_memory or not block.is_before_question or not fillers:
            return state
        for repeat in range(self.number):
            sources = [fillers[(row + repeat) % len(fillers)] for row in range(len(batch.keys))]
            state = _update_again(model, state, batch.input_ids_BT[sources, block.stop - 1 : block.stop], sources)
        return state


class FamChange(StepPart):
    """Add the change of the FAM in the updates of sequences that give no key, in front of the question.

    A first update, which has no residual, is left out.
    """

    def __init__(self, weight: float) -> None:
        """Add it with this weight."""
        self.weight = weight

    def note(self, state: ReadingState, batch: Batch, block: Block) -> torch.Tensor:
        """Return which rows of the FAM should not change."""
        holds_B = [False] * len(batch.keys)
        if state.has_memory and block.is_before_question:
            begun = zip(state.num_blocks_per_row, state.starts_from_saved_fam, batch.is_told_B.tolist(), strict=True)
            holds_B = [not is_told and (saved or num_blocks > 0) for num_blocks, saved, is_told in begun]
        return torch.tensor(holds_B)

    def within(
        self, before: ReadingState, after: ReadingState, hidden_BTD: torch.Tensor, note: torch.Tensor
    ) -> torch.Tensor:
        """Return the length of the change, relative to the FAM's own: mean over layers and rows, sum over `note`."""
        changes = []
        for old, new in zip(before.layers, after.layers, strict=True):
            updated = new.fam_before_bound
            if updated is None or not bool(note.any()):
                continue
            old_NFD = old.fam[note]
            length_NF = torch.linalg.vector_norm(old_NFD.detach(), dim=-1).clamp(min=1e-6)
            change_NF = torch.linalg.vector_norm(updated[note] - old_NFD, dim=-1)
            changes.append((change_NF / length_NF).mean(-1).sum())
        return torch.stack(changes).mean() if changes else torch.zeros(())

    def finish(self, output: StepOutput, given: list[torch.Tensor], notes: list[torch.Tensor]) -> StepOutput:
        """Add the mean over the updates."""
        change = sum(given, torch.zeros(())) / max(1, sum(int(note.sum()) for note in notes))
        return replace(output, loss=output.loss + self.weight * change, fam_change=change.detach())


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
