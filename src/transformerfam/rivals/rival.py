"""A rival as a decoder carries it, one piece of a lane on its way through the layers, and what it may do there.

A piece is a run of tokens of one segment. Its rows are

    [rows in front, if it begins a segment | tokens | rows after them, if it completes one]

and each sees what is before it in the segment. A row's position is its place there.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformerfam.decoder.layouts import LayerLayout
from transformerfam.decoder.memory import Memory
from transformerfam.decoder.model import ModelWithMemory
from transformerfam.decoder.step import Step, StepCache, run_decoder
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.rivals.config import RivalConfig
from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.masks import segment_mask
from transformerfam.rivals.mixing import Mixture
from transformerfam.rivals.start import init_state
from transformerfam.rivals.state import RivalState


class Rival(Memory):
    """The parameters of a rival, and what it does to a segment: the decoder's submodule `rival`.

    Attributes:
        config: the configuration in force.
        mixes: whether it changes what an attention gives, before its last matrix.
        is_endless: whether a segment never ends.
        has_memory: whether its memory has a fixed size.
        names_of_rows: names of the parameters that are rows among the tokens.
        memory_rows_see_each_other: whether rows in front, or after the tokens, see all of their kind.
        hidden_size: width of the layers.
    """

    slot = "rival"
    config_name = "rival_config"
    state_class = RivalState
    own_methods: ClassVar[dict[str, Callable[..., Any]]] = {"init_state": init_state}
    config: RivalConfig
    mixes = False
    is_endless = False
    has_memory = True
    names_of_rows: tuple[str, ...] = ()
    memory_rows_see_each_other = False
    _like: torch.Tensor

    def __init__(self, config: RivalConfig, model: PreTrainedModel, layouts: Sequence[LayerLayout]) -> None:
        super().__init__()
        self.config = config
        self.layouts = tuple(layouts)
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
        """Return a matrix drawn as the model's own were, from the rival's own generator."""
        matrix = nn.Linear(num_inputs, num_outputs, bias=False)
        nn.init.normal_(matrix.weight, std=self._std, generator=self._draw)
        return matrix

    def zeros(self, *shape: int) -> torch.Tensor:
        """Return zeros of the model's type, on its device."""
        return self._like.new_zeros(shape)

    @property
    def learned_rows(self) -> list[nn.Parameter]:
        """The parameters that are rows among the tokens."""
        return [parameter for name, parameter in self.named_parameters() if name in self.names_of_rows]

    def require_own(self, state: RivalState) -> None:
        """Refuse a state of another rival, or of another configuration of it.

        Raises:
            StateMismatchError: it is.
        """
        if state.config != self.config:
            raise StateMismatchError("state belongs to another model or rival; start a new one with model.init_state()")

    def run_piece(
        self, decoder: Any, state: RivalState, tokens_BTD: torch.Tensor, counts: list[int], kwargs: dict[str, Any]
    ) -> MoeModelOutputWithPast:
        """Send one piece of every sequence through the layers, lane by lane, and move the state on; see `Memory`.

        Raises:
            TransformerFamError: router logits are wanted.
        """
        if kwargs.get("output_router_logits", getattr(decoder.config, "output_router_logits", False)):
            raise TransformerFamError(
                "output_router_logits is True, and a rival's rows are split by their places, so it gives none; "
                "leave it out, or set it False in the model's configuration"
            )
        lanes: list[Lane] = []
        parts: list[list[torch.Tensor]] = []  # of every lane: hidden states after the last norm, then those of layers
        for lane in state.lanes:
            by_count: dict[int, list[int]] = {}
            for i, row in enumerate(lane.rows):
                by_count.setdefault(counts[row], []).append(i)
            for count, indices in by_count.items():
                part = lane.select(indices)
                lanes.append(part)
                tokens = tokens_BTD[part.rows, :count]
                parts.append(self._run_lane(decoder, part, tokens, kwargs) if count else [tokens])
        state.set_lanes(lanes)
        order = torch.argsort(torch.tensor([row for lane in lanes for row in lane.rows])).to(tokens_BTD.device)
        longest, joined = max(counts), []
        for kind in range(max(map(len, parts))):
            # A lane without tokens has one kind, which is empty.
            own = [part[min(kind, len(part) - 1)] for part in parts]
            filled = [torch.nn.functional.pad(hidden, (0, 0, 0, longest - hidden.shape[1])) for hidden in own]
            joined.append(
                torch.cat(filled)[order] if len(lanes) > 1 or lanes[0].rows != sorted(lanes[0].rows) else filled[0]
            )
        return MoeModelOutputWithPast(last_hidden_state=joined[0], hidden_states=tuple(joined[1:]) or None)

    def _run_lane(
        self, decoder: Any, lane: Lane, tokens_BTD: torch.Tensor, kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Send one piece of a lane through the layers, and move it on.

        Returns:
            Hidden states of the tokens `(B, T, D)`: those after the last norm, then those of every layer if wanted.
        """
        piece = RivalPiece(self, lane, tokens_BTD.shape[1])
        cache = StepCache(range(len(self.layouts)), piece)
        rows = piece.rows(tokens_BTD)
        output = run_decoder(decoder, rows, piece.position_ids(rows.device), cache, **kwargs)
        piece.advance(output.last_hidden_state)
        return [hidden[:, piece.tokens] for hidden in (output.last_hidden_state, *(output.hidden_states or ()))]

    # What a rival may do

    def initial_memory(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Return what is carried before the first segment, `(B, ...)` each."""
        return {}

    def rows_in_front(self, lane: Lane) -> torch.Tensor | None:
        """Return embeddings `(B, n, D)` that come before a segment."""
        return None

    def rows_behind(self, lane: Lane) -> torch.Tensor | None:
        """Return embeddings `(B, n, D)` that come after a segment."""
        return None

    def enter_layer(self, piece: "RivalPiece", layer_idx: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return a layer's input."""
        return hidden_BTD

    def mix(
        self, piece: "RivalPiece", layer_idx: int, query_BHTK: torch.Tensor, output_BTHK: torch.Tensor
    ) -> torch.Tensor:
        """Return what the attention gives, before its last matrix."""
        return output_BTHK

    def after_attention(
        self, piece: "RivalPiece", layer_idx: int, output_BTD: torch.Tensor, factor: float
    ) -> torch.Tensor:
        """Return what is added, times `factor`, to the residual after attention."""
        return output_BTD

    def leave_layer(self, piece: "RivalPiece", layer_idx: int, hidden_BTD: torch.Tensor) -> None:
        """Note a layer's output."""

    def end_segment(self, piece: "RivalPiece", hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the memory after a segment, or those parts of it that change there.

        Args:
            piece: the piece that completed it, with the keys and values of the whole segment.
            hidden_BTD: all of its rows after the last norm.
        """
        return {}


class RivalPiece(Step):
    """A run of tokens of one lane's segment.

    Args:
        rival: what is done to it.
        lane: where it continues; `advance` moves it on.
        num_tokens: tokens that every sequence adds.

    Attributes:
        keys: of every layer `(B, G, S, K)`: the segment up to the end of this piece, without rows after it.
        values: likewise.
        own: of every layer, keys and values of this piece's rows.
        entered: of every layer, its input; kept where a rival needs it.
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
        """Where the tokens are among the rows."""
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

    def sight(self, layer: int) -> Mixture:
        """Return what the back end for rivals that mix gets in the mask's place."""
        return Mixture(self, layer)

    def enter_layer(self, layer: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Hand a layer's input to the rival."""
        return self.rival.enter_layer(self, layer, hidden_BTD)

    def attend(self, layer: int, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the keys and values of the rows, and return all that are in the segment so far."""
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
        """Return queries or keys from place `start` on as they were before RoPE."""
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
            hidden_BTD: all rows after the last norm.
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


class RivalModel(ModelWithMemory[RivalState], Protocol):
    """What `attach` returns: the model that it was given, as a type checker sees it."""

    rival_config: RivalConfig

    def init_state(
        self,
        batch_size: int = 1,
        carried: torch.Tensor | None = None,
        position_offset: int = 0,
        is_saved: Any = None,
    ) -> RivalState:
        """Start a reading; see the function `init_state`."""
