"""The seams: hooks of every layer that hand what goes through it to the step, and methods of one model alone."""

import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from transformerfam.decoder.cache_argument import cache_in
from transformerfam.decoder.families import Family
from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.kernels import BACK_END, MIXED_BACK_END
from transformerfam.decoder.served import part_of
from transformerfam.decoder.step import Step, SteppedCache
from transformerfam.errors import UnsupportedModelError


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
    """Make `function` a method of this one object, with the signature of the method it replaces."""
    setattr(target, name, BoundMethod(function, target, getattr(type(target), name, None)))


class _OnTheWay(threading.local):
    """Pieces between two hooks of a layer, with their parts of the state: every thread's own.

    Attributes:
        entered: what goes through the layer.
        behind_attention: what went through attention and comes to the branch.
    """

    entered: tuple[Step, Any] | None = None
    behind_attention: tuple[Step, Any] | None = None

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
        """Put the rows that query in front of what the norm, or attention itself, is given."""
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
        """Hand weights and output to the piece, or note the input of the norm after attention."""
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

    def _find(self, kwargs: dict[str, Any]) -> tuple[Step, Any] | None:
        """Return the piece that goes through and the layer's part of its state; None where there is no piece."""
        state = cache_in(kwargs)
        if not isinstance(state, SteppedCache) or state.step is None:
            return None
        return state.step, state.layers[self.layer_idx]
