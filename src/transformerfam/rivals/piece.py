"""One piece of a lane on its way through the layers, and what a rival may do there.

A piece is a run of tokens of one segment. Its rows are

    [rows in front, if it begins a segment | tokens | rows behind, if it completes one]

and each sees what stands in front of it in the segment. A row's position is its place there.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from transformerfam.decoder.families import family_of
from transformerfam.decoder.identity import ModelIdentity
from transformerfam.decoder.kernels import MIXED_BACK_END
from transformerfam.decoder.layouts import LayerLayout
from transformerfam.decoder.step import PassingStep
from transformerfam.errors import UnsupportedModelError
from transformerfam.rivals.config import RivalConfig
from transformerfam.rivals.state import Lane


class Rival(nn.Module):
    """The parameters of a rival, and what it does to a segment: the decoder's submodule `rival`.

    Attributes:
        config: the configuration in force.
        layouts: what every layer hands to its cache.
        mixes: whether it changes what an attention gives, in front of its last matrix.
        is_endless: whether a segment never ends.
        has_memory: whether its memory has a fixed size.
        learned_rows: names of the parameters that stand among the tokens as rows.
        memory_rows_see_each_other: whether rows in front, or behind, see all of their kind.
        hidden_size: width of the layers.
    """

    mixes = False
    is_endless = False
    has_memory = True
    learned_rows: tuple[str, ...] = ()
    memory_rows_see_each_other = False
    _like: torch.Tensor

    def __init__(self, config: RivalConfig, model: PreTrainedModel, layouts: Sequence[LayerLayout]) -> None:
        super().__init__()
        self.config = config
        self.layouts = tuple(layouts)
        self.identity: ModelIdentity | None = None
        self.hidden_size: int = model.get_input_embeddings().weight.shape[1]
        self.num_heads: int = model.config.num_attention_heads
        self._std: float = getattr(model.config, "initializer_range", 0.02)
        self._draw = torch.Generator().manual_seed(0)
        self.build(model)
        del self._draw
        weight = model.get_input_embeddings().weight
        self.to(weight)
        self.register_buffer("_like", weight.new_empty(0), persistent=False)  # goes where the model goes

    def build(self, model: PreTrainedModel) -> None:
        """Make the parameters."""

    def linear(self, num_inputs: int, num_outputs: int) -> nn.Linear:
        """Return a matrix drawn as the model's own were, from a generator of the rival's own."""
        matrix = nn.Linear(num_inputs, num_outputs, bias=False)
        nn.init.normal_(matrix.weight, std=self._std, generator=self._draw)
        return matrix

    def zeros(self, *shape: int) -> torch.Tensor:
        """Return zeros of the model's type, on its device."""
        return self._like.new_zeros(shape)

    # What a rival may do

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return what is carried before the first segment, `(B, ...)` each."""
        return {}

    def rows_in_front(self, lane: Lane) -> torch.Tensor | None:
        """Return embeddings `(B, n, D)` that stand in front of a segment."""
        return None

    def rows_behind(self, lane: Lane) -> torch.Tensor | None:
        """Return embeddings `(B, n, D)` that stand behind a segment."""
        return None

    def enter_layer(self, piece: "RivalPiece", layer_idx: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return a layer's input."""
        return hidden_BTD

    def mix(
        self, piece: "RivalPiece", layer_idx: int, query_BHTK: torch.Tensor, output_BTHK: torch.Tensor
    ) -> torch.Tensor:
        """Return what the attention gives, in front of its last matrix."""
        return output_BTHK

    def after_attention(
        self, piece: "RivalPiece", layer_idx: int, output_BTD: torch.Tensor, factor: float
    ) -> torch.Tensor:
        """Return what is added, times `factor`, to the residual behind attention."""
        return output_BTD

    def leave_layer(self, piece: "RivalPiece", layer_idx: int, hidden_BTD: torch.Tensor) -> None:
        """Note a layer's output."""

    def end_segment(self, piece: "RivalPiece", hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the memory behind a segment, or those parts of it that change there.

        Args:
            piece: the piece that completed it, with the keys and values of the whole segment.
            hidden_BTD: all of its rows behind the last norm.
        """
        return {}


class RivalPiece(PassingStep):
    """A run of tokens of one lane's segment.

    Args:
        rival: what is done to it.
        lane: where it goes on; it is moved on by `advance`.
        num_tokens: tokens that every sequence adds.

    Attributes:
        keys: of every layer `(B, G, S, K)`: the segment up to the end of this piece, without rows behind it.
        values: likewise.
        own: of every layer, keys and values of this piece's rows.
        entered: of every layer, its input; kept where a rival asks for it.
        updates: parts of the memory that this piece changes.
        scratch: what it adds to the lane's.
    """

    def __init__(self, rival: Rival, lane: Lane, num_tokens: int) -> None:
        self.rival, self.lane, self.num_tokens = rival, lane, num_tokens
        begins = lane.fill == 0 and not (rival.is_endless and lane.num_blocks)
        self.completes = lane.fill + num_tokens == rival.config.block_size
        self.front = rival.rows_in_front(lane) if begins else None
        self.behind = rival.rows_behind(lane) if self.completes else None
        self.num_front = 0 if self.front is None else self.front.shape[1]
        self.num_behind = 0 if self.behind is None else self.behind.shape[1]
        self.start = lane.num_slots
        self.num_rows = self.num_front + num_tokens + self.num_behind
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.entered: dict[int, torch.Tensor] = {}
        self.updates: dict[str, torch.Tensor] = {}
        self.scratch: dict[str, torch.Tensor] = {}

    @property
    def tokens(self) -> slice:
        """Where the tokens stand among the rows."""
        return slice(self.num_front, self.num_front + self.num_tokens)

    def rows(self, tokens_BTD: torch.Tensor) -> torch.Tensor:
        """Return all rows, `(B, num_rows, D)`."""
        parts = [part for part in (self.front, tokens_BTD, self.behind) if part is not None]
        return torch.cat([part.to(tokens_BTD.dtype) for part in parts], dim=1) if len(parts) > 1 else tokens_BTD

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Return the positions of all rows, `(1, num_rows)`."""
        return torch.arange(self.start, self.start + self.num_rows, device=device)[None]

    def mask(self, layer: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return what every row sees, as a bias on its logits, `(1, 1, num_rows, S + num_rows)`."""
        num_front = self.num_front or self.lane.num_front
        behind = self.num_behind if self.rival.memory_rows_see_each_other else 0
        front = self.num_front if self.rival.memory_rows_see_each_other else 0
        window = self.rival.layouts[layer].window
        return segment_mask(self.start, self.num_rows, num_front, front, behind, window, dtype, device)

    def sight(self, layer: int) -> "Mixture":
        """Return what the back end for rivals that mix gets in the mask's place."""
        return Mixture(self, layer)

    def enter_layer(self, layer: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Hand a layer's input to the rival."""
        return self.rival.enter_layer(self, layer, hidden_BTD)

    def attend(self, layer: int, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the keys and values of the rows, and return all that stand in the segment so far."""
        self.own.append((key_BGTK, value_BGTK))
        if self.lane.keys:
            key = torch.cat((self.lane.keys[layer].to(key_BGTK.dtype), key_BGTK), dim=2)
            value = torch.cat((self.lane.values[layer].to(value_BGTK.dtype), value_BGTK), dim=2)
        else:
            key, value = key_BGTK, value_BGTK
        kept = key.shape[2] - self.num_behind
        self.keys.append(key[:, :, :kept])
        self.values.append(value[:, :, :kept])
        return key, value

    def after_attention(self, layer: int, output_BTD: torch.Tensor, factor: float) -> torch.Tensor:
        """Hand what is added to the residual to the rival."""
        return self.rival.after_attention(self, layer, output_BTD, factor)

    def leave_layer(self, layer: int, hidden_BTD: torch.Tensor) -> None:
        """Hand a layer's output to the rival."""
        self.rival.leave_layer(self, layer, hidden_BTD)

    def normed_input(self, layer: int) -> torch.Tensor:
        """Return a layer's input over its root mean square, where the rival kept it in `entered`."""
        entered_BTD = self.entered[layer]
        return rms_norm(entered_BTD, entered_BTD.shape[-1:])

    def unturned(self, layer: int, rows_BHTK: torch.Tensor, start: int) -> torch.Tensor:
        """Return queries or keys that stand from place `start` on as they were before RoPE."""
        distances = range(-start, -start - rows_BHTK.shape[2], -1)
        return self.rival.layouts[layer].turner.turn(rows_BHTK, rows_BHTK, distances)[0]

    def segment(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the segment's keys, as they were before RoPE, and values, without rows in front."""
        num_front = self.num_front or self.lane.num_front
        key, value = self.keys[layer][:, :, num_front:], self.values[layer][:, :, num_front:]
        return self.unturned(layer, key, num_front), value

    def advance(self, hidden_BTD: torch.Tensor) -> None:
        """Move the lane on.

        Args:
            hidden_BTD: all rows behind the last norm.
        """
        lane = self.lane
        if self.completes:
            self.updates |= self.rival.end_segment(self, hidden_BTD)
        lane.memory |= self.updates
        lane.scratch |= self.scratch
        lane.num_front = self.num_front or lane.num_front
        lane.keys, lane.values = self.keys, self.values
        lane.fill += self.num_tokens
        if self.completes:
            lane.fill = 0
            lane.num_blocks += 1
            lane.num_remembered += 1
            if not self.rival.is_endless:
                lane.keys, lane.values, lane.scratch, lane.num_front = [], [], {}, 0


@functools.lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def segment_mask(
    start: int,
    num_rows: int,
    num_front: int,
    num_joined_front: int,
    num_joined_behind: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Return the mask of a piece as a bias on its logits, `(1, 1, num_rows, start + num_rows)`.

    Args:
        start: rows of the segment in front of the piece.
        num_rows: of the piece.
        num_front: memory rows in front of the segment, which no window hides.
        num_joined_front: first rows of the piece, which see each other.
        num_joined_behind: last rows of the piece, which see each other.
        window: last places that a row sees, its own included; None is all.
        dtype: floating type of the logits.
        device: where to.
    """
    place, row = torch.arange(start + num_rows)[None], torch.arange(start, start + num_rows)[:, None]
    seen = place <= row
    if window is not None:
        seen &= (row - place < window) | (place < num_front)
    seen[:num_joined_front, start : start + num_joined_front] = True
    if num_joined_behind:
        seen[-num_joined_behind:, -num_joined_behind:] = True
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype).masked_fill(seen, 0)
    return mask[None, None].to(device)


class Mixture:
    """What the back end for rivals that mix gets in the mask's place: the piece, and the layer it goes through."""

    def __init__(self, piece: RivalPiece, layer: int) -> None:
        self.piece, self.layer = piece, layer


def attend_and_mix(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mixture | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with torch's attention, and let the rival add what its memory gives: a back end of transformers."""
    if not isinstance(attention_mask, Mixture):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    piece, layer = attention_mask.piece, attention_mask.layer
    mask = piece.mask(layer, query.dtype, query.device)
    output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    return piece.rival.mix(piece, layer, query, output), None


AttentionInterface.register(MIXED_BACK_END, attend_and_mix)
AttentionMaskInterface.register(MIXED_BACK_END, sdpa_mask)


def require_plain_heads(rival: Rival, model: PreTrainedModel) -> None:
    """Refuse a model whose queries and keys a memory of the attention's own heads cannot take.

    Raises:
        UnsupportedModelError: latent attention, or attention that does not go through transformers' interface as
            torch's own.
    """
    name, system = type(model).__name__, rival.config.system
    if any(layout.turner.is_in_values for layout in rival.layouts):
        raise UnsupportedModelError(f"{name} carries latents, and {system} needs the heads' own keys and values")
    if not family_of(model).has_attention_interface:
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention interface, in which {system} adds "
            "its memory"
        )
    if model.config._attn_implementation != "sdpa":
        raise UnsupportedModelError(
            f"attention back end is {model.config._attn_implementation!r}, required for {system} is 'sdpa'"
        )
