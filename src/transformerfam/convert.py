"""Give a transformers decoder a working memory, in place.

The model's own forward runs unchanged, one piece at a time. FAM comes in through four seams: extra rows in front of
the tokens, the cache, the mask, and the rows' residual. Where they are in a family's layers, `families`
says.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from transformerfam.cache_argument import cache_in
from transformerfam.config import FamConfig
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.families import FAMILIES, Family, decoder_layers, family_of, part_of
from transformerfam.flash import FLASH_BACK_ENDS
from transformerfam.forward import read_pieces
from transformerfam.half_precision import MEAN_SHARE_WITHOUT_NORM
from transformerfam.identity import ModelIdentity
from transformerfam.kernels import BACK_END, MIXED_BACK_END
from transformerfam.layouts import find_layouts
from transformerfam.memory import (
    FamMemory,
    LayerLayout,
    fam_parameters,
    memory_of,
    personal_memory,
    set_block_size,
    set_key_bias,
)
from transformerfam.positions import first_position, warn_beyond_trained
from transformerfam.reading import READER_METHODS, init_state
from transformerfam.seams import check_model, check_seams, check_structure
from transformerfam.unlisted import UNFORESEEN, check_converted, convert_by_checks, own_logits
from transformerfam.versions import does_not_fit

__all__ = ["convert", "fam_parameters", "memory_of", "personal_memory", "set_block_size", "set_key_bias"]


METHODS: dict[str, Callable[..., Any]] = {"init_state": init_state} | READER_METHODS
"""What a converted model has beside its class's methods, or in their place; modules above this one add theirs."""


def convert(model: PreTrainedModel, config: FamConfig) -> PreTrainedModel:
    """Give `model` a working memory, in place; its class and weights stay as they are.

    Adds `model.fam_config`, `model.init_state()` and `model.read()`, and lets `model(...)` and `model.generate(...)`
    take a `FamState` as `past_key_values`. The seams are checked with numbers on the model at hand. A model on
    attention back end `sdpa` goes on with back end `fam`, which computes the same without a dense mask;
    `model.set_attn_implementation("sdpa")` switches that off.

    A hybrid model, where some layers have a sliding window of their own, keeps those as they are and carries FAM on
    the others, unless `fam_layers` says otherwise; the layers are then named in `model.fam_config`.

    A family without a row in the table is tried by more checks, where its layers' parts have the usual names.

    Args:
        model: a decoder with a language-model head of a served family.
        config: block size, FAM length and every other choice.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family is not served, or a seam does not do what the algorithm says.

    Warns:
        UserWarning: the family has no row, and was found by the checks.

    Source: DESIGN, "How FAM enters a model"; Algorithms 1 and 2.
    """
    check_model(model)
    if hasattr(model.get_decoder(), "fam"):
        raise UnsupportedModelError(
            "the model is converted already; load it again to convert it with another configuration"
        )
    if model.config.model_type in FAMILIES:
        _convert(model, config, has_row=True)
    else:
        convert_by_checks(model, lambda: _convert(model, config, has_row=False))
    warn_beyond_trained(model.config, first_position(config) + config.block_size)
    return model


def _convert(model: PreTrainedModel, config: FamConfig, has_row: bool) -> None:
    """Attach a memory and check it; where it does not fit, the model is as it was."""
    check_structure(model, config)
    back_end, type_of_model = model.config._attn_implementation, type(model)
    unforeseen = (TypeError, AttributeError, KeyError) if has_row else UNFORESEEN
    handles: list[Any] | None = None
    try:
        with torch.autocast(model.device.type, enabled=False):  # whose rounding is none of the model's own type
            expected = None if has_row else own_logits(model)
            handles = attach(model, config, find_layouts(model))
            check_seams(model, every_layer=not has_row)
            if expected is not None:
                check_converted(model, expected)
    except (TransformerFamError, *unforeseen) as error:
        if handles is not None:
            revert(model, handles)
            model.set_attn_implementation(back_end)
        if isinstance(error, TransformerFamError):
            raise
        raise does_not_fit(f"{type(model).__name__} does not run as conversion runs it ({error})") from error
    assert type(model) is type_of_model


def attach(model: PreTrainedModel, config: FamConfig, layouts: Sequence[LayerLayout]) -> list[Any]:
    """Do what `convert` does, without looking whether it fits the model; return the handles of the hooks.

    Args:
        model: as for `convert`, not converted yet.
        config: as for `convert`.
        layouts: what every layer hands to its cache.
    """
    decoder, family, embedding = model.get_decoder(), family_of(model), model.get_input_embeddings()
    config = _with_fam_layers(config, layouts)
    _check_slots(config, layouts)
    memory = FamMemory(config, embedding, layouts)
    asks_by_queries = family.has_attention_interface and family.asks_by_queries
    memory.caches_queries = asks_by_queries and not family.is_parallel(model.config)
    if not family.is_parallel(model.config) and family.behind == "mlp":
        memory.mean_share = MEAN_SHARE_WITHOUT_NORM
    memory.identity = ModelIdentity(model)
    decoder.fam = memory
    if family.has_attention_interface:
        own = FLASH_BACK_ENDS | {"sdpa": BACK_END}
        model.set_attn_implementation(own.get(model.config._attn_implementation, model.config._attn_implementation))
    handles = []
    for layer_idx, layer in enumerate(decoder_layers(model)):
        handles += LayerSeam(layer_idx, family, model.config).attach(layer)
    bind_method(decoder, "forward", read_pieces)
    for name, function in METHODS.items():
        bind_method(model, name, function)
    model.fam_config = config
    return handles


class BoundMethod:
    """A function as a method of one object: copied, pickled and saved with it.

    (A method of Python's own goes into a pickle as a name to look up, and is not there yet when it comes out.)
    """

    def __init__(self, function: Callable[..., Any], target: Any, original: Callable[..., Any] | None) -> None:
        self.function = function
        self.target = target
        self.__name__ = function.__name__ if original is None else original.__name__
        self.__doc__ = function.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's own method in whose place it is."""
        original = getattr(type(self.target), self.__name__, None)
        if original is not None:
            return inspect.signature(MethodType(original, self.target))
        return inspect.signature(MethodType(self.function, self.target))

    @property
    def __self__(self) -> Any:
        """The object that it is a method of."""
        return self.target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the object in front."""
        return self.function(self.target, *args, **kwargs)


def bind_method(target: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Make `function` a method of this one object, with the signature of the method it stands in for."""
    setattr(target, name, BoundMethod(function, target, getattr(type(target), name, None)))


def revert(model: PreTrainedModel, handles: Sequence[Any]) -> None:
    """Undo a conversion that the checks refused."""
    decoder = model.get_decoder()
    for handle in handles:
        handle.remove()
    del decoder.fam, decoder.forward, model.fam_config
    for name in METHODS:
        delattr(model, name)


def _with_fam_layers(config: FamConfig, layouts: Sequence[LayerLayout]) -> FamConfig:
    """Name the layers that carry FAM in a hybrid model: those without a window of their own."""
    layers = tuple(layer_idx for layer_idx, layout in enumerate(layouts) if layout.window is None)
    if config.fam_length == 0 or config.fam_layers is not None or len(layers) in (0, len(layouts)):
        return config
    return config.replace(fam_layers=layers)


def _check_slots(config: FamConfig, layouts: Sequence[LayerLayout]) -> None:
    """Refuse slots in layers whose keys and values differ in shape, since a state stacks them."""
    if not config.has_slots:
        return
    shapes = {i: (each.key_shape, each.value_shape) for i, each in enumerate(layouts) if config.carries_fam(i)}
    lowest = min(shapes)
    for layer_idx, shape in shapes.items():
        if shape != shapes[lowest]:
            raise UnsupportedModelError(
                f"fam_feeds is 'slots', and layer {layer_idx} keeps keys and values of {shape} heads and widths, layer "
                f"{lowest} of {shapes[lowest]}; name layers of one shape in fam_layers"
            )


class _OnTheWay(threading.local):
    """Pieces between two hooks of a layer, with their parts of the state: every thread's own.

    Attributes:
        entered: what goes through the layer.
        behind_attention: what went through attention and comes to the branch.
    """

    entered: tuple[Any, Any] | None = None
    behind_attention: tuple[Any, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # nothing is on its way in a copy


class LayerSeam:
    """The hooks of one layer: they hand its rows, its mask and its residual to the piece that goes through.

    Args:
        layer_idx: number of the layer.
        family: where in the layer they sit.
        config: of the model.
    """

    def __init__(self, layer_idx: int, family: Family, config: Any) -> None:
        self.layer_idx = layer_idx
        self.family = family
        self.branch_factor = family.branch_factor(config)  # before the branch is added to the residual
        self.entries = family.entries(config)
        self._on_the_way = _OnTheWay()

    def attach(self, layer: nn.Module) -> list[Any]:
        """Register the hooks and return their handles."""
        attention, branch = (part_of(layer, name) for name in (self.family.attention, self.family.branch))
        handles = [
            layer.register_forward_pre_hook(self.enter_layer, with_kwargs=True),
            layer.register_forward_hook(self.leave_layer, with_kwargs=True),
            attention.register_forward_hook(self.after_attention, with_kwargs=True),
        ]
        for name in self.entries:
            handles.append(part_of(layer, name).register_forward_pre_hook(self.enter_branch, with_kwargs=True))
        if not self.family.has_attention_interface:
            handles.append(attention.register_forward_pre_hook(self.ask_for_weights, with_kwargs=True))
        if branch is not attention:
            handles.append(branch.register_forward_hook(self.after_branch))
        return handles

    def enter_layer(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the layer's FAM and mask in place."""
        found = self._on_the_way.entered = self._find(kwargs)
        if found is None:
            return None
        step, layer = found
        hidden_BTD = step.enter_layer(layer, args[0])
        attention: Any = module.get_submodule(self.family.attention)
        if not hasattr(attention, "config"):
            raise UnsupportedModelError(
                f"attention of layer {self.layer_idx} is a {type(attention).__name__} now, which takes no FAM; leave "
                "the layer's own attention in place (PEFT's adaption prompts replace it, LoRA does not)"
            )
        back_end = attention.config._attn_implementation
        takes_sight = back_end in (BACK_END, MIXED_BACK_END, *FLASH_BACK_ENDS.values())
        mask: Any = step.sight(layer) if takes_sight else None
        if mask is None or (back_end == BACK_END and mask.window is not None):
            kind = hidden_BTD.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_BTD.dtype
            mask = step.mask(layer, dtype, hidden_BTD.device)
            mask = step.masked_sight(layer, mask) if takes_sight else mask
        if back_end == "flex_attention":  # it looks every sequence's mask up
            mask = mask.expand(len(hidden_BTD), -1, -1, -1)
        return (hidden_BTD, *args[1:]), kwargs | {"attention_mask": mask}

    def enter_branch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the rows that ask in front of what the norm, or attention itself, is given."""
        entered = self._on_the_way.entered
        if entered is None:
            return None
        step, layer = entered
        if args:
            return (step.enter_branch(layer, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": step.enter_branch(layer, kwargs["hidden_states"])}

    def ask_for_weights(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let an attention that does not go through transformers' interface give its weights."""
        entered = self._on_the_way.entered
        if entered is None or not entered[0].wants_weights:
            return None
        return args, kwargs | {"output_attentions": True}

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hand weights and output to the piece, or note what goes on to the norm behind attention."""
        found = self._find(kwargs)
        if found is None:
            return output
        found[0].note_weights(found[1], output[1])
        if self.family.branch != self.family.attention:
            self._on_the_way.behind_attention = found
            return output
        step, layer = found
        return (step.after_attention(layer, output[0], self.branch_factor), *output[1:])

    def after_branch(self, module: nn.Module, args: tuple[Any, ...], output_BTD: torch.Tensor) -> torch.Tensor:
        """Hand what the norm gives to the piece."""
        found, self._on_the_way.behind_attention = self._on_the_way.behind_attention, None
        if found is None:
            return output_BTD
        step, layer = found
        return step.after_attention(layer, output_BTD, self.branch_factor)

    def leave_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what the FAM rows became."""
        found, self._on_the_way.entered = self._find(kwargs), None
        if found is not None:
            step, layer = found
            step.leave_layer(layer, output[0] if isinstance(output, tuple) else output)

    def _find(self, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Return the piece that goes through and the layer's part of its state; None where there is no piece."""
        state = cache_in(kwargs)
        step = getattr(state, "step", None)
        if not isinstance(state, Cache) or step is None:
            return None
        return step, state.layers[self.layer_idx]
