"""Give a transformers decoder a working memory, in place.

The model's own forward runs unchanged, one piece at a time. FAM comes in through four seams: extra rows in front of
the tokens, the cache, the mask, and the residual of the first update. This is the only module that knows
transformers' internals.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel

from transformerfam.attention import Piece
from transformerfam.config import FamConfig
from transformerfam.errors import UnsupportedModelError
from transformerfam.forward import read_pieces
from transformerfam.identity import ModelIdentity, describe_architecture
from transformerfam.kernels import BACK_END
from transformerfam.memory import FamMemory, InitialFam, fam_parameters, memory_of, set_block_size, set_key_bias
from transformerfam.positions import KeyTurner
from transformerfam.reading import init_state, prepare_cache_for_generation, read
from transformerfam.seams import check_seams, check_structure

__all__ = ["convert", "fam_parameters", "memory_of", "set_block_size", "set_key_bias"]

SERVED_MODEL_TYPES = ("llama",)


def convert(model: PreTrainedModel, config: FamConfig) -> PreTrainedModel:
    """Give `model` a working memory, in place; its class and weights stay as they are.

    Adds `model.fam_config`, `model.init_state()` and `model.read()`, and lets `model(...)` and `model.generate(...)`
    take a `FamState` as `past_key_values`. The seams are checked with numbers on the model at hand. A model on
    attention back end `sdpa` goes on with back end `fam`, which computes the same without a dense mask;
    `model.set_attn_implementation("sdpa")` switches that off.

    Args:
        model: a decoder with a language-model head of a served family.
        config: block size, FAM length and every other choice.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family is not served, or a seam does not do what the algorithm says.

    Source: DESIGN, "How FAM enters a model"; Algorithms 1 and 2.
    """
    check_structure(model, config, SERVED_MODEL_TYPES)
    decoder = model.get_decoder()
    if hasattr(decoder, "fam"):
        raise UnsupportedModelError(
            "the model is converted already; load it again to convert it with another configuration"
        )
    embedding = model.get_input_embeddings()
    memory = FamMemory(config, embedding, len(decoder.layers)).to(embedding.weight.device)
    memory.turner = KeyTurner(decoder.rotary_emb.inv_freq)
    memory.identity = ModelIdentity(model, describe_architecture(model))
    decoder.fam = memory
    back_end = model.config._attn_implementation
    if back_end == "sdpa":
        model.set_attn_implementation(BACK_END)
    handles = []
    for layer_idx, layer in enumerate(decoder.layers):
        handles += [
            layer.register_forward_pre_hook(functools.partial(_enter_layer, layer_idx), with_kwargs=True),
            layer.register_forward_hook(functools.partial(_leave_layer, layer_idx), with_kwargs=True),
            layer.self_attn.register_forward_hook(functools.partial(_after_attention, layer_idx), with_kwargs=True),
        ]
    _bind(decoder, "forward", read_pieces)
    _bind(model, "init_state", init_state)
    _bind(model, "read", read)
    _bind(model, "_prepare_cache_for_generation", prepare_cache_for_generation)
    type_of_model = type(model)
    model.fam_config = config
    try:
        check_seams(model)
    except UnsupportedModelError:
        revert(model, handles)
        model.set_attn_implementation(back_end)
        raise
    assert type(model) is type_of_model
    return model


def _bind(target: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Make `function` a method of this one object, with the signature of the method it stands in for."""
    original = getattr(type(target), name, None)
    if original is not None:
        function = functools.wraps(original)(function)
        function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(target, name, MethodType(function, target))


def revert(model: PreTrainedModel, handles: Sequence[Any]) -> None:
    """Undo a conversion that the checks refused."""
    decoder = model.get_decoder()
    for handle in handles:
        handle.remove()
    del decoder.fam, decoder.forward, model.init_state, model.read, model.fam_config
    del model._prepare_cache_for_generation


def _piece_of(kwargs: dict[str, Any]) -> "Piece | InitialFam | None":
    state = kwargs.get("past_key_values")
    return getattr(state, "step", None) if isinstance(state, Cache) else None


def _enter_layer(
    layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    piece = _piece_of(kwargs)
    if piece is None:
        return None
    state = kwargs["past_key_values"]
    layer = state.layers[layer_idx]
    hidden_BTD = piece.enter_layer(layer, args[0])
    self_attn: Any = module.self_attn
    sight = piece.sight(layer) if self_attn.config._attn_implementation == BACK_END else None
    mask = piece.mask(layer, hidden_BTD.dtype, hidden_BTD.device) if sight is None else sight
    return (hidden_BTD, *args[1:]), kwargs | {"attention_mask": mask}


def _after_attention(
    layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    piece = _piece_of(kwargs)
    if piece is None:
        return output
    return (piece.after_attention(kwargs["past_key_values"].layers[layer_idx], output[0]), *output[1:])


def _leave_layer(layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    piece = _piece_of(kwargs)
    if piece is not None:
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        piece.leave_layer(kwargs["past_key_values"].layers[layer_idx], hidden_BTD)
