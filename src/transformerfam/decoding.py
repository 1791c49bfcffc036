"""Decoding as one compiled graph of static shapes: nearly every token of a text is one that stands inside its block.

Such a token writes one slot of every layer's buffer and sees the rest of the buffer through a mask. All its shapes are
those of any other, so torch.compile makes one graph of all layers, and the Python of some hundred calls per layer is
gone. Tokens that begin or complete a block, where the FAM is at work, go the ordinary way.
"""

import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedModel

from transformerfam.attention import Piece
from transformerfam.errors import TransformerFamError
from transformerfam.masks import buffer_mask
from transformerfam.memory import StepCache, memory_of, run_decoder


@dataclasses.dataclass
class _Buffers:
    """One layer's keys and values, `(B, G, slots, K)`, and whether FAM slots are among them."""

    keys: torch.Tensor
    values: torch.Tensor
    has_fam: bool


class _TokenStep:
    """One token of every sequence on its way through the layers.

    Args:
        masks: `(B, 1, 1, slots)` what the tokens see, for layers with and without FAM.
        slots: `(B,)` where their keys and values go, likewise.
    """

    def __init__(self, masks: dict[bool, torch.Tensor], slots: dict[bool, torch.Tensor]) -> None:
        self.masks = masks
        self.slots = slots

    def enter_layer(self, layer: _Buffers, hidden_B1D: torch.Tensor) -> torch.Tensor:
        """Leave the input as it is."""
        return hidden_B1D

    def mask(self, layer: _Buffers, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the mask of a layer."""
        return self.masks[layer.has_fam]

    def sight(self, layer: _Buffers) -> None:
        """Ask for the mask."""

    def attend(
        self, layer: _Buffers, key_BG1K: torch.Tensor, value_BG1K: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the tokens' keys and values in place, and return the whole buffer."""
        slots = self.slots[layer.has_fam]
        rows = torch.arange(len(slots), device=slots.device)
        layer.keys[rows, :, slots] = key_BG1K[:, :, 0].to(layer.keys.dtype)
        layer.values[rows, :, slots] = value_BG1K[:, :, 0].to(layer.values.dtype)
        return layer.keys, layer.values

    def after_attention(self, layer: _Buffers, output_B1D: torch.Tensor) -> torch.Tensor:
        """Leave the attention output as it is."""
        return output_B1D

    def leave_layer(self, layer: _Buffers, hidden_B1D: torch.Tensor) -> None:
        """Note nothing."""


class CompiledStep:
    """The step of one token of each of `batch_size` sequences, compiled; it serves reading without gradients.

    Args:
        decoder: the converted decoder.
        batch_size: sequences; other batches go the ordinary way.
        options: go on to `torch.compile`.
    """

    def __init__(self, decoder: Any, batch_size: int, options: dict[str, Any]) -> None:
        self.batch_size = batch_size
        # A code object of its own: torch.compile keeps its graphs there, and few of them.
        own = FunctionType(_through_the_layers.__code__.replace(), globals())
        self._function: Callable[..., torch.Tensor] = torch.compile(own, dynamic=False, fullgraph=True, **options)
        self._decoder = decoder

    def serves(self, piece: Piece) -> bool:
        """Whether a piece is one token of every sequence, and none begins or completes a block with FAM."""
        is_one_token = piece.num_rows == 0 and piece.num_tokens == min(piece.counts) == 1
        has_gradient = torch.is_grad_enabled() or piece.state.layers[0].keys.requires_grad
        return is_one_token and len(piece.counts) == self.batch_size and not has_gradient

    def run(self, piece: Piece, hidden_B1D: torch.Tensor) -> torch.Tensor:
        """Send a piece through the layers, which write their buffers in place.

        Args:
            piece: one that it `serves`.
            hidden_B1D: its embeddings.

        Returns:
            `(B, 1, D)` after the last norm.
        """
        state, device = piece.state, hidden_B1D.device
        kinds = {layer.fam is not None: layer.sections for layer in state.layers}
        fills = torch.tensor(state.block_fill, device=device)
        masks = {
            has_fam: buffer_mask(state.config, has_fam, 0, piece.phase, hidden_B1D.dtype).to(device)
            for has_fam in kinds
        }
        return self._function(
            self._decoder,
            hidden_B1D.contiguous(),
            piece.position_ids(device).expand(self.batch_size, -1).contiguous(),
            {kind: mask.expand(self.batch_size, -1, -1, -1).contiguous() for kind, mask in masks.items()},
            {kind: sections.block + fills for kind, sections in kinds.items()},
            [_Buffers(layer.keys, layer.values, layer.fam is not None) for layer in state.layers],
        )


def _through_the_layers(
    decoder: Any,
    hidden_B1D: torch.Tensor,
    positions_B1: torch.Tensor,
    masks: dict[bool, torch.Tensor],
    slots: dict[bool, torch.Tensor],
    buffers: list[_Buffers],
) -> torch.Tensor:
    output = run_decoder(decoder, hidden_B1D, positions_B1, StepCache(buffers, _TokenStep(masks, slots)))
    return output.last_hidden_state


@torch.no_grad()
def compile_decoding(model: PreTrainedModel, batch_size: int = 1, **options: Any) -> None:
    """Compile the step of one token of a converted model, in place; outputs stay the same up to rounding.

    It takes about half a minute for 30 layers, needs what `torch.compile` needs (on a CPU a C++ compiler), and is
    worth it where many tokens are generated. Reading and training are as before.

    Args:
        model: converted.
        batch_size: sequences that are decoded together; other batches stay as they are.
        **options: go on to `torch.compile`, for example `backend` or `mode`.

    Raises:
        TransformerFamError: the model is not converted, it cannot be compiled here, or every token begins or
            completes a block.
    """
    memory, decoder = memory_of(model), model.get_decoder()
    if memory.config.fam_length and memory.config.block_size < 3:
        raise TransformerFamError(
            f"block_size is {memory.config.block_size}, required for compiled decoding is at least 3, since tokens "
            "that begin or complete a block are not compiled"
        )
    step = CompiledStep(decoder, batch_size, options)
    interpret_decoding(model)
    state, token = model.init_state(batch_size), torch.zeros(batch_size, 1, dtype=torch.long)
    model.read(token, state)
    memory.token_step = step
    try:
        model.read(token, state)
    except Exception as error:
        interpret_decoding(model)
        raise TransformerFamError(
            f"decoding cannot be compiled here: {str(error).strip().splitlines()[0]}; it works without compile_decoding"
        ) from error


def interpret_decoding(model: PreTrainedModel) -> None:
    """Undo `compile_decoding`."""
    memory_of(model).token_step = None
