"""FAM as a decoder carries it: its parameters and settings, and how its pieces go through the layers."""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformerfam.config import FamConfig
from transformerfam.decoder.half_precision import MEAN_SHARE
from transformerfam.decoder.layouts import LayerLayout
from transformerfam.decoder.memory import Memory, set_configuration
from transformerfam.decoder.memory import memory_of as any_memory_of
from transformerfam.decoder.model import ModelWithMemory
from transformerfam.decoder.positions import first_position, warn_beyond_trained
from transformerfam.decoder.step import run_decoder
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.fam.initial import QUERY_BACK_ENDS, initial_prompt, refresh_queries
from transformerfam.fam.layer import LayerPlan
from transformerfam.fam.piece import Piece
from transformerfam.fam.row_lora import bind_lora, leading_rows
from transformerfam.fam.start import init_state
from transformerfam.fam.state import FamState


def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Write a converted model as transformers does, with its memory next to it; see `weights.pretrained`.

    The room above this one writes files, and is loaded when something is written.
    """
    importlib.import_module("transformerfam.weights.pretrained").save_pretrained(self, save_directory, *args, **kwargs)


class FamMemory(Memory):
    """The prompt or prefix of FAM, and the settings that it is read with: the decoder's submodule `fam`.

    Attributes:
        config: the configuration in force.
        prompt: `(F, D)` embeddings from which the initial FAM is made (`fam_init="prompt"`).
        prefix: `(L, F, D)` initial FAM of every layer (`fam_init="prefix"`).
        mean_share: how large a row may be in the model's type, see `half_precision`.
        caches_queries: whether attention can be handed queries of the initial FAM, so that with `fam_query="initial"` F
            rows go through the layers, not 2 F: not where the feed-forward is given what attention is made from.
    """

    slot = "fam"
    config_name = "fam_config"
    state_class = FamState
    own_methods: ClassVar[dict[str, Callable[..., Any]]] = {
        "init_state": init_state,
        "save_pretrained": save_pretrained,
    }
    config: FamConfig

    def __init__(self, config: FamConfig, embedding: nn.Embedding, layouts: Sequence[LayerLayout]) -> None:
        super().__init__()
        self.config = config
        self.layouts = tuple(layouts)
        self.mean_share = MEAN_SHARE
        self.caches_queries = False
        self.compiled_steps: list[Any] = []  # the pieces that go through a compiled graph, see `compiled`
        if config.fam_length == 0:
            return
        rows = initial_prompt(embedding, config.fam_length)
        if config.fam_init == "prompt":
            self.prompt = nn.Parameter(rows)
        else:
            self.prefix = nn.Parameter(rows.expand(len(layouts), -1, -1).clone())

    def __getstate__(self) -> dict[str, Any]:
        """Leave compiled steps out of copies and pickles, which are compiled again or not at all."""
        return self.__dict__ | {"compiled_steps": []}

    def fam_width(self, hidden_size: int) -> int:
        """Return the numbers of one row of the FAM: `hidden_size`, or with slots all heads' keys and values."""
        if not self.config.has_slots:
            return hidden_size
        lowest = next(layout for i, layout in enumerate(self.layouts) if self.config.carries_fam(i))
        return sum(count * width for count, width in (lowest.key_shape, lowest.value_shape))

    def plans(self) -> list[LayerPlan]:
        """Return what every layer keeps and sees with the configuration in force."""
        return LayerPlan.for_layers(self.config, [layout.window for layout in self.layouts])

    @property
    def learned_rows(self) -> list[nn.Parameter]:
        """Prompt `(F, D)` or prefix `(L, F, D)`; none for BSWA."""
        return list(self.parameters())

    def kept_in_own_type(self) -> list[nn.Parameter]:
        """Return prompt or prefix."""
        return self.learned_rows

    def require_own(self, state: FamState) -> None:
        """Refuse a state of another configuration; its bias may be another.

        Raises:
            StateMismatchError: it is.
        """
        if state.config.replace(fam_key_bias=0.0) != self.config.replace(fam_key_bias=0.0):
            raise StateMismatchError(
                f"state was made with {state.config}, the model has {self.config}; start a new one with "
                "model.init_state()"
            )

    def prepare(self, decoder: Any, state: FamState, num_tokens: int) -> None:
        """Make the queries that the state keeps again, where they are needed and the weights have changed."""
        if max(state.block_fill) + num_tokens >= state.config.block_size:
            refresh_queries(decoder, state)

    def run_piece(
        self, decoder: Any, state: FamState, tokens_BTD: torch.Tensor, counts: list[int], kwargs: dict[str, Any]
    ) -> MoeModelOutputWithPast:
        """Send one piece through the layers with FAM rows in front, and move the state on; see `Memory`."""
        piece = Piece(state, counts, takes_queries=decoder.config._attn_implementation in QUERY_BACK_ENDS)
        if piece.num_rows:
            rows = tokens_BTD.new_zeros(len(tokens_BTD), piece.num_rows, tokens_BTD.shape[2])
            tokens_BTD = torch.cat((rows, tokens_BTD), dim=1)
        step = next((step for step in self.compiled_steps if step.serves(piece)), None)
        if step is not None and kwargs.get("output_hidden_states", decoder.config.output_hidden_states):
            step = None  # a compiled step gives the last ones alone
        if piece.begins and state.config.fam_lora == "rows":
            assert self.identity is not None
            bind_lora(self.identity.model)
        state.step = piece
        try:
            with leading_rows(piece.num_rows):
                if step is not None:
                    output = MoeModelOutputWithPast(last_hidden_state=step.run(piece, tokens_BTD))
                else:
                    output = run_decoder(decoder, tokens_BTD, piece.position_ids(tokens_BTD.device), state, **kwargs)
            piece.advance(output.last_hidden_state)
        finally:
            state.step = None
        router_logits = getattr(output, "router_logits", None)  # of every layer with experts, `(B * rows, experts)`
        return MoeModelOutputWithPast(
            last_hidden_state=output.last_hidden_state[:, piece.num_rows :],
            hidden_states=output.hidden_states,  # with FAM rows, to the tensors that the layers have used
            router_logits=router_logits
            and tuple(logits.unflatten(0, (len(counts), -1))[:, piece.num_rows :] for logits in router_logits),
        )


def memory_of(model: PreTrainedModel) -> FamMemory:
    """Return the converted model's `FamMemory`; of several, as PEFT keeps them per adapter, the active one's.

    Raises:
        TransformerFamError: the model is not converted, or an adapter has the name of a parameter of the memory.
    """
    memory = any_memory_of(model)
    if not isinstance(memory, FamMemory):
        raise TransformerFamError(
            f"the model's memory is a {type(memory).__name__}, required is FAM; load the model again and convert it"
        )
    return memory


def fam_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the only new parameters: prompt `(F, D)` or prefix `(L, F, D)`; none for BSWA."""
    return list(memory_of(model).parameters())


def set_key_bias(model: PreTrainedModel, value: float) -> None:
    """Set `fam_key_bias` of a converted model; states that exist keep theirs."""
    change_config(model, fam_key_bias=float(value) if type(value) is int else value)


def set_block_size(model: PreTrainedModel, block_size: int) -> None:
    """Set `block_size` of a converted model; a state with another one is refused from now on, its FAM is not."""
    change_config(model, block_size=block_size)
    warn_beyond_trained(model.config, first_position(model.fam_config) + block_size)


def change_config(model: PreTrainedModel, **changes: Any) -> None:
    """Change fields of the configuration of a converted model."""
    set_configuration(model, memory_of(model).config.replace(**changes))


class FamModel(ModelWithMemory[FamState], Protocol):
    """What `convert` returns: the model that it was given, as a type checker sees it."""

    fam_config: FamConfig

    def init_state(
        self,
        batch_size: int = 1,
        fam: torch.Tensor | None = None,
        position_offset: int = 0,
        is_saved: Sequence[bool] | None = None,
    ) -> FamState:
        """Start a reading; see `fam.start.init_state`."""
