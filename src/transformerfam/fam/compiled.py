"""Pieces that are as nearly all others, each as one compiled graph of static shapes through all layers.

While it decodes, nearly every token is inside its block: it writes one slot of every layer's buffer and sees the
rest through a mask. While it reads, nearly every piece is a whole block after full memory segments. Both have the
shapes of any other of their kind, so torch.compile makes one graph of each, and the Python of some hundred calls per
layer is gone. Every other piece is run uncompiled.
"""

import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.kernels import BACK_END
from transformerfam.decoder.step import Step, StepCache, run_decoder
from transformerfam.errors import TransformerFamError
from transformerfam.fam.masks import buffer_mask
from transformerfam.fam.memory import memory_of
from transformerfam.fam.piece import Piece
from transformerfam.fam.state import FamState


@dataclasses.dataclass
class _Buffers:
    """One layer's keys and values, `(B, G, slots, K)`, and its kind."""

    keys: torch.Tensor
    values: torch.Tensor
    kind: int


class _TokenStep(Step):
    """One token of every sequence on its way through the layers.

    Args:
        masks: `(B, 1, 1, slots)` what the tokens see, for every kind of layer.
        slots: `(B,)` where their keys and values go, likewise.
    """

    def __init__(self, masks: dict[int, torch.Tensor], slots: dict[int, torch.Tensor]) -> None:
        self.masks = masks
        self.slots = slots

    def mask(self, layer: _Buffers, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the mask of a layer."""
        return self.masks[layer.kind]

    def sight(self, layer: _Buffers) -> None:
        """Ask for the mask."""

    def attend(
        self, layer: _Buffers, key_BG1K: torch.Tensor, value_BG1K: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the tokens' keys and values in place, and return the whole buffer."""
        slots = self.slots[layer.kind]
        rows = torch.arange(len(slots), device=slots.device)
        layer.keys[rows, :, slots] = key_BG1K[:, :, 0].to(layer.keys.dtype)
        layer.values[rows, :, slots] = value_BG1K[:, :, 0].to(layer.values.dtype)
        return layer.keys, layer.values


class CompiledStep:
    """A kind of piece of `batch_size` sequences, compiled; it serves reading without gradients.

    Args:
        function: what is compiled.
        decoder: the converted decoder.
        batch_size: sequences; other batches are run uncompiled.
        options: passed on to `torch.compile`.
    """

    def __init__(
        self, function: Callable[..., torch.Tensor], decoder: Any, batch_size: int, options: dict[str, Any]
    ) -> None:
        self.batch_size = batch_size
        # Its own code object: torch.compile keeps its graphs there, and few of them.
        own = FunctionType(function.__code__.replace(), function.__globals__)
        self._function: Callable[..., torch.Tensor] = torch.compile(own, dynamic=False, fullgraph=True, **options)
        self._decoder = decoder

    def serves(self, piece: Piece) -> bool:
        """Whether a piece has the batch size, and its state no gradient."""
        has_gradient = torch.is_grad_enabled() or any(layer.keys.requires_grad for layer in piece.state.layers)
        return len(piece.counts) == self.batch_size and not has_gradient


class CompiledToken(CompiledStep):
    """One token of every sequence inside its block."""

    def serves(self, piece: Piece) -> bool:
        """Whether no sequence begins or completes a block with FAM, too."""
        is_plain = piece.num_rows == 0 and not piece.writes_slots
        return super().serves(piece) and is_plain and piece.num_tokens == min(piece.counts) == 1

    def run(self, piece: Piece, hidden_B1D: torch.Tensor) -> torch.Tensor:
        """Send a piece through the layers, which write their buffers in place.

        Args:
            piece: one that it `serves`.
            hidden_B1D: its embeddings.

        Returns:
            `(B, 1, D)` after the last norm.
        """
        state, device = piece.state, hidden_B1D.device
        kinds = {layer.kind: layer for layer in state.layers}
        fills = torch.tensor(state.block_fill, device=device)
        masks = {
            kind: buffer_mask(state.config, layer.plan, 0, piece.phase, hidden_B1D.dtype).to(device)
            for kind, layer in kinds.items()
        }
        return self._function(
            self._decoder,
            hidden_B1D.contiguous(),
            piece.position_ids(device).expand(self.batch_size, -1).contiguous(),
            {kind: mask.expand(self.batch_size, -1, -1, -1).contiguous() for kind, mask in masks.items()},
            {kind: layer.sections.block + fills for kind, layer in kinds.items()},
            [_Buffers(layer.keys, layer.values, layer.kind) for layer in state.layers],
        )


class CompiledBlock(CompiledStep):
    """A whole block after full memory segments."""

    def serves(self, piece: Piece) -> bool:
        """Whether every sequence reads a whole block, too, and has read as many as are in sight at most."""
        is_whole = piece.phase.is_uniform and piece.counts[0] == piece.config.block_size
        is_steady = min(piece.state.num_blocks_per_row) >= piece.state.num_blocks_until_steady
        return super().serves(piece) and is_whole and is_steady

    def run(self, piece: Piece, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Send a piece through the layers, which write their buffers in place.

        Args:
            piece: one that it `serves`.
            hidden_BTD: FAM rows and embeddings, `(B, num_rows + block_size, D)`.

        Returns:
            `(B, num_rows + block_size, D)` after the last norm.
        """
        for layer in piece.state.layers:  # made here, outside of the graph
            sight = piece.sight(layer)
            if sight is None or sight.window or self._decoder.config._attn_implementation != BACK_END:
                piece.mask(layer, hidden_BTD.dtype, hidden_BTD.device)
        positions = piece.position_ids(hidden_BTD.device)
        return self._function(self._decoder, hidden_BTD.contiguous(), positions, piece.state)


def _token_through_the_layers(
    decoder: Any,
    hidden_B1D: torch.Tensor,
    positions_B1: torch.Tensor,
    masks: dict[int, torch.Tensor],
    slots: dict[int, torch.Tensor],
    buffers: list[_Buffers],
) -> torch.Tensor:
    output = run_decoder(decoder, hidden_B1D, positions_B1, StepCache(buffers, _TokenStep(masks, slots)))
    return output.last_hidden_state


def _block_through_the_layers(
    decoder: Any, hidden_BTD: torch.Tensor, positions: torch.Tensor, state: FamState
) -> torch.Tensor:
    return run_decoder(decoder, hidden_BTD, positions, state).last_hidden_state


@torch.no_grad()
def compile_decoding(model: PreTrainedModel, batch_size: int = 1, **options: Any) -> None:
    """Compile the step of one token of a converted model, in place; outputs stay the same up to rounding.

    It takes about half a minute for 30 layers, needs what `torch.compile` needs (on a CPU a C++ compiler), and is
    worth it where many tokens are generated.

    Args:
        model: converted.
        batch_size: sequences that are decoded together; other batches stay as they are.
        **options: passed on to `torch.compile`, for example `backend` or `mode`.

    Raises:
        TransformerFamError: the model is not converted, it cannot be compiled here, or every token begins or
            completes a block.
    """
    memory = memory_of(model)
    if memory.config.fam_length and memory.config.block_size < 3:
        raise TransformerFamError(
            f"block_size is {memory.config.block_size}, required for compiled decoding is at least 3, since tokens "
            "that begin or complete a block are not compiled"
        )
    step = CompiledToken(_token_through_the_layers, model.get_decoder(), batch_size, options)
    _add(model, step, num_tokens=1, num_before=1)


@torch.no_grad()
def compile_reading(model: PreTrainedModel, batch_size: int = 1, **options: Any) -> None:
    """Compile the step of one whole block of a converted model, in place; outputs stay the same up to rounding.

    It takes up to a minute for 30 layers and is worth it where very much is read, or with a small model. Arguments and
    errors are those of `compile_decoding`.
    """
    memory = memory_of(model)
    step = CompiledBlock(_block_through_the_layers, model.get_decoder(), batch_size, options)
    num_before = max(plan.num_blocks_until_steady(memory.config) for plan in memory.plans())
    _add(model, step, num_tokens=memory.config.block_size, num_before=num_before)


def _add(model: PreTrainedModel, step: CompiledStep, num_tokens: int, num_before: int) -> None:
    """Take a step into use after the first pieces of a reading that it does not serve, and let it compile now."""
    memory, reader = memory_of(model), cast(Any, model)
    state = reader.init_state(step.batch_size)
    piece = torch.zeros(step.batch_size, num_tokens, dtype=torch.long)
    for _ in range(num_before):
        reader.read(piece, state)
    others = [other for other in memory.compiled_steps if type(other) is not type(step)]
    memory.compiled_steps = [step, *others]
    try:
        reader.read(piece, state)
    except Exception as error:
        memory.compiled_steps = others
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise TransformerFamError(
            f"the model cannot be compiled here: {reason}; it works as before, uncompiled"
        ) from error


def interpret(model: PreTrainedModel) -> None:
    """Undo `compile_decoding` and `compile_reading`."""
    memory_of(model).compiled_steps = []
