"""What a converted decoder carries: the base class of FAM and of all that it is compared with.

A memory is a submodule of the decoder. `attach_memory` puts it there, with the seams in every layer, the decoder's
`forward` and the methods that a model with a memory has; `detach_memory` undoes it. `memory_of` finds it.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformerfam.decoder.cache_argument import take_cache
from transformerfam.decoder.identity import ModelIdentity
from transformerfam.decoder.layouts import LayerLayout
from transformerfam.decoder.peft_calls import refuse_adapters_by_place
from transformerfam.decoder.pieces import NOT_COMPILED, Inputs, read_in_pieces, state_or_new, take_over
from transformerfam.decoder.reading import READER_METHODS
from transformerfam.decoder.seams import LayerSeam, bind_method
from transformerfam.decoder.served import decoder_layers, family_of
from transformerfam.decoder.slot import SLOTS, memory_in
from transformerfam.decoder.state import ReadingState
from transformerfam.errors import TransformerFamError


class Memory(nn.Module, abc.ABC):
    """The parameters and settings that a memory adds to a decoder, and how its readings begin and move on.

    Attributes:
        slot: name of the submodule.
        config_name: what the model has its configuration as.
        state_class: of its readings.
        own_methods: what a model has with this memory alone, by name: `init_state` at least. Its further arguments in
            their order are: sequences, what they start from (`ReadingState.carried`), position of the first token, and
            which sequences start from it.
        config: the configuration in force; it has a `block_size`.
        layouts: what every layer hands to its cache.
        identity: of the model, noted when the memory is attached.
        base_back_end: attention back end of the base model where the memory needs its own; None elsewhere.
    """

    slot: ClassVar[str]
    config_name: ClassVar[str]
    state_class: ClassVar[type[ReadingState]]
    own_methods: ClassVar[dict[str, Callable[..., Any]]]
    config: Any
    layouts: Sequence[LayerLayout]
    identity: ModelIdentity | None = None
    base_back_end: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "slot" in cls.__dict__:
            SLOTS.add(cls.slot)

    @property
    @abc.abstractmethod
    def learned_rows(self) -> list[nn.Parameter]:
        """The parameters that are rows among the tokens."""

    def kept_in_own_type(self) -> list[nn.Parameter]:
        """Return the parameters that keep their type when the model's weights are held in another."""
        return []

    @abc.abstractmethod
    def require_own(self, state: Any) -> None:
        """Refuse a state of another configuration.

        Raises:
            StateMismatchError: it is.
        """

    def prepare(self, decoder: Any, state: Any, num_tokens: int) -> None:
        """Do what a state needs before it reads so many tokens more."""

    @abc.abstractmethod
    def run_piece(
        self, decoder: Any, state: Any, tokens_BTD: torch.Tensor, counts: list[int], kwargs: dict[str, Any]
    ) -> MoeModelOutputWithPast:
        """Send one piece of every sequence through the layers, and move the state on.

        Args:
            decoder: whose layers they are.
            state: in front of the piece.
            tokens_BTD: embeddings of its tokens; after a sequence's count is padding.
            counts: tokens of every sequence, at most what its block still takes.
            kwargs: further arguments of the model's forward.
        """

    @classmethod
    def methods(cls) -> dict[str, Callable[..., Any]]:
        """Return the methods that a model has with it besides its class's, or in their place."""
        return cls.own_methods | READER_METHODS


def memory_of(model: PreTrainedModel) -> Memory:
    """Return a model's memory; of several, as PEFT keeps them per adapter, the active one's.

    Raises:
        TransformerFamError: there is none, an adapter has the name of a parameter of the memory, or the configuration
            that the model shows was assigned.
    """
    memory = memory_in(model.get_decoder())
    if memory is None:
        raise TransformerFamError("the model has no memory yet; call convert(model, FamConfig(...)) first")
    if isinstance(memory, Memory):
        return _of_one_configuration(model, memory)
    for name in memory.modules_to_save:
        if name in dict(memory.original_module.named_parameters()):
            raise TransformerFamError(
                f"an adapter is named {name!r}, as a parameter of the memory is, which PEFT could not save with it; "
                "name the adapter otherwise"
            )
    own = [name for name in memory.active_adapters if name in memory.modules_to_save]
    return _of_one_configuration(model, memory.modules_to_save[own[0]] if own else memory.original_module)


def _of_one_configuration(model: PreTrainedModel, memory: Memory) -> Memory:
    """Return the memory if the configuration that the model shows is the one it reads with, else refuse."""
    name = memory.config_name
    if getattr(model, name, memory.config) != memory.config:
        raise TransformerFamError(
            f"model.{name} was assigned, which changes nothing in the memory; call set_block_size or set_key_bias, or "
            "convert the base model with another configuration"
        )
    return memory


def set_configuration(model: PreTrainedModel, config: Any) -> None:
    """Put a configuration in force in a model's memory, all of PEFT's copies of it, and what the model shows."""
    name = memory_of(model).config_name
    for module in model.modules():  # of a PeftModel, the model inside shows it
        if isinstance(module, Memory):
            module.config = config
        elif name in vars(module):
            setattr(module, name, config)


@contextlib.contextmanager
def probing_with(model: PreTrainedModel, config: Any) -> Iterator[None]:
    """Put a configuration in force for a probe, without dropout."""
    before, was_training = memory_of(model).config, model.training
    set_configuration(model, config)
    model.eval()
    try:
        yield
    finally:
        set_configuration(model, before)
        model.train(was_training)


def attach_memory(model: PreTrainedModel, memory: Memory) -> list[Any]:
    """Give a model a memory, in place, without looking whether it fits; return the handles of the hooks."""
    decoder, family = model.get_decoder(), family_of(model)
    memory.identity = ModelIdentity(model)
    setattr(decoder, memory.slot, memory)
    handles = []
    for layer_idx, layer in enumerate(decoder_layers(model)):
        handles += LayerSeam(layer_idx, family, model.config).attach(layer)
    bind_method(decoder, "forward", read_pieces)
    for name, function in memory.methods().items():
        bind_method(model, name, function)
    setattr(model, memory.config_name, memory.config)
    return handles


def detach_memory(model: PreTrainedModel, handles: Sequence[Any]) -> None:
    """Undo `attach_memory`; the attention back end stays."""
    decoder, memory = model.get_decoder(), memory_of(model)
    for handle in handles:
        handle.remove()
    delattr(decoder, memory.slot)
    del decoder.forward
    delattr(model, memory.config_name)
    for name in memory.methods():
        delattr(model, name)


def hold_weights_in(dtype: str, model: PreTrainedModel, only_frozen: bool = False) -> None:
    """Hold a model's weights in another type, in place; the rows of its memory, and what states check, stay.

    Tables of RoPE stay float32, which `model.to(dtype)` would round.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        model: with a memory.
        only_frozen: leave what is trained as it is.
    """
    memory = memory_of(model)
    assert memory.identity is not None
    kept = {id(parameter) for parameter in memory.kept_in_own_type()}
    kept |= {id(parameter) for parameter in model.parameters() if only_frozen and parameter.requires_grad}
    with memory.identity.keeping_digests(of_memory=False):
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                parameter.data = parameter.data.to(getattr(torch, dtype))


@torch.compiler.disable(reason=NOT_COMPILED)
def read_pieces(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: ReadingState | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the decoder over tokens of any number, piece by piece; a piece never crosses a block boundary.

    This is `forward` of the decoder of a model with a memory. Positions follow from the state.

    Args:
        self: the decoder.
        input_ids: `(B, T)` new tokens.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, which takes no position, wherever it is; of a longer
            mask the last T columns count.
        position_ids: `(1 or B, T)`, from any number on; refused where they do not run on by one.
        cache: the state to advance, or `past_key_values`; None starts one.
        inputs_embeds: `(B, T, D)` instead of `input_ids`.
        use_cache: False leaves the state out of the output; None is the model's configuration.
        **kwargs: passed on to the model's own forward.

    Returns:
        Hidden states `(B, T, D)` after the last norm (of padding: any finite values), and the state.

    Raises:
        TransformerFamError: an argument is not supported; the message names it.
        StateMismatchError: the state is another model's, or of another configuration or batch.
    """
    memory: Any = memory_in(self)
    refuse_adapters_by_place(memory.identity.model)
    inputs = Inputs.of(self, input_ids, inputs_embeds, attention_mask, position_ids, use_cache, kwargs)
    state = state_or_new(take_cache(kwargs, cache), memory.state_class, memory.identity, len(inputs.embeds_BTD))
    memory.require_own(state)
    take_over(state, memory.identity, inputs.embeds_BTD.shape[1])
    memory.prepare(self, state, inputs.embeds_BTD.shape[1])
    return read_in_pieces(self, state, inputs, memory.run_piece, kwargs)
