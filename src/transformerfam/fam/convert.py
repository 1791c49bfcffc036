"""Give a transformers decoder a working memory, in place.

The model's own forward runs unchanged, one piece at a time. FAM comes in through four seams: extra rows in front of
the tokens, the cache, the mask, and the rows' residual. Where they are in a family's layers, `families`
says.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.families import FAMILIES
from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.half_precision import MEAN_SHARE_WITHOUT_NORM
from transformerfam.decoder.kernels import BACK_END
from transformerfam.decoder.layouts import LayerLayout, find_layouts
from transformerfam.decoder.memory import attach_memory, detach_memory
from transformerfam.decoder.positions import first_position, warn_beyond_trained
from transformerfam.decoder.served import family_of
from transformerfam.decoder.slot import memory_in
from transformerfam.decoder.structure import check_model, check_structure
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.fam.checks import check_seams, check_update
from transformerfam.fam.layer_checks import UNFORESEEN
from transformerfam.fam.memory import (
    FamMemory,
    FamModel,
    fam_parameters,
    memory_of,
    set_block_size,
    set_key_bias,
)
from transformerfam.fam.prompt import personal_memory
from transformerfam.fam.unlisted import check_converted, convert_by_checks, own_logits
from transformerfam.versions import does_not_fit

__all__ = ["convert", "fam_parameters", "memory_of", "personal_memory", "set_block_size", "set_key_bias"]


def convert(model: PreTrainedModel, config: FamConfig) -> FamModel:
    """Give `model` a working memory, in place; its class and weights stay as they are.

    Adds `model.fam_config`, `model.init_state()` and `model.read()`, and lets `model(...)` and `model.generate(...)`
    take a `FamState` as `past_key_values`. The seams are checked with numbers on the model at hand. A model on
    attention back end `sdpa` gets back end `fam` instead, which computes the same without a dense mask;
    `model.set_attn_implementation("sdpa")` switches that off.

    A hybrid model, where some layers have their own sliding window, keeps those as they are and carries FAM on
    the others, unless `fam_layers` says otherwise; the layers are then named in `model.fam_config`.

    A family without a row in the table is tried by more checks, where its layers' parts have the usual names.

    Args:
        model: a decoder with a language-model head of a served family.
        config: block size, FAM length and every other choice.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family is not served, or a seam does not do what the algorithm says.
        TransformerFamError: `config` is no `FamConfig`.

    Warns:
        UserWarning: the family has no row, and was found by the checks.

    Source: DESIGN, "How FAM enters a model"; Algorithms 1 and 2.
    """
    if not isinstance(config, FamConfig):
        raise TransformerFamError(
            f"config is a {type(config).__name__}, required is a FamConfig; FamConfig.from_dict makes one of values"
        )
    check_model(model)
    if memory_in(model.get_decoder()) is not None:
        raise UnsupportedModelError(
            "the model is converted already; load it again to convert it with another configuration"
        )
    if model.config.model_type in FAMILIES:
        _convert(model, config, has_row=True)
    else:
        convert_by_checks(model, lambda: _convert(model, config, has_row=False))
    warn_beyond_trained(model.config, first_position(config) + config.block_size)
    return cast(FamModel, model)


def _convert(model: PreTrainedModel, config: FamConfig, has_row: bool) -> None:
    """Attach a memory and check it; where it does not fit, the model is as it was."""
    check_structure(model)
    check_update(model, config)
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
            detach_memory(model, handles)
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
    family, embedding = family_of(model), model.get_input_embeddings()
    config = _with_fam_layers(config, layouts)
    _check_slots(config, layouts)
    memory = FamMemory(config, embedding, layouts)
    asks_by_queries = family.has_attention_interface and family.asks_by_queries
    memory.caches_queries = asks_by_queries and not family.is_parallel(model.config)
    if not family.is_parallel(model.config) and family.behind == "mlp":
        memory.mean_share = MEAN_SHARE_WITHOUT_NORM
    handles = attach_memory(model, memory)
    if family.has_attention_interface:
        own = FLASH_BACK_ENDS | {"sdpa": BACK_END}
        model.set_attn_implementation(own.get(model.config._attn_implementation, model.config._attn_implementation))
    return handles


def _with_fam_layers(config: FamConfig, layouts: Sequence[LayerLayout]) -> FamConfig:
    """Name the layers that carry FAM in a hybrid model: those without their own window."""
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
