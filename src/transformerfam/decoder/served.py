"""Which family a model is of, where the parts of its layers are, and why a model is not served."""

from typing import Any

from torch import nn

from transformerfam.decoder.families import (
    FAMILIES,
    NOT_SERVED,
    SEQUENCES,
    Family,
    attention_itself,
    one,
    one_norm,
    residual_multiplier,
)
from transformerfam.errors import UnsupportedModelError
from transformerfam.versions import does_not_fit

OTHER_LAYERS = {
    "linear_attention": ", whose recurrent state a FamState does not carry, and which would read FAM rows as tokens",
    "chunked_attention": ", where the first token of a chunk sees nothing in front of it, and no memory either",
    "indexed_attention": ", which chooses a few keys by a separate index, not by the keys in sight",
}
"""What is in the way of a memory in layers of other types."""


def usual_families(layer: nn.Module, config: Any) -> list[Family]:
    """Return what a layer of a family without a row may be, by the usual names of its parts.

    Args:
        layer: of the decoder.
        config: of the model.
    """
    parts = {name for name, _ in layer.named_children()}
    attention = next((name for name in ("self_attn", "attention") if name in parts), None)
    if attention is None:
        return []
    inner = {name for name, _ in layer.get_submodule(attention).named_children()}
    output = next((name for name in ("o_proj", "dense", "out_proj") if name in inner), None)
    if output is None:
        return []
    factor = residual_multiplier if hasattr(config, "residual_multiplier") else one
    found = []
    for name, sequence in SEQUENCES.items():
        choices: dict[str, Any] = {"branch": attention, "entries": one_norm} | sequence
        entries = {attention} if choices["entries"] is attention_itself else {"input_layernorm"}
        if choices["entries"] is attention_itself and "input_layernorm" in parts:
            continue
        if {choices["branch"], choices["behind"], *entries} <= parts:
            kind = Family(
                name=name,
                attention=attention,
                output_projection=output,
                branch_factor=factor,
                asks_by_queries=False,
                **choices,
            )
            found.append(kind)
    return found


def family_of(model: Any) -> Family:
    """Return the family of a model: that of its `model_type`, or the one that conversion has found by numbers."""
    found: Family | None = getattr(model.get_decoder(), "fam_family", None)
    return FAMILIES[model.config.model_type] if found is None else found


def require_row(model_type: str, what: str) -> None:
    """Refuse a family that has no row in the table.

    Raises:
        UnsupportedModelError: names what needs one.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no row in the table of families, which {what} needs; it has "
            f"{', '.join(FAMILIES)}"
        )


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return a served model's decoder layers."""
    layers: nn.ModuleList = getattr(model.get_decoder(), family_of(model).layers)
    return layers


def part_of(layer: nn.Module, name: str) -> nn.Module:
    """Return a submodule of a layer.

    Raises:
        UnsupportedModelError: there is none of this name.
    """
    try:
        return layer.get_submodule(name)
    except AttributeError as error:
        raise does_not_fit(
            f"the residual seam does not fit this model: {type(layer).__name__} has no part {name!r}"
        ) from error


def refuse_by_configuration(name: str, config: Any) -> None:
    """Refuse a model that is known not to work with the memory, before its layers are looked at.

    Args:
        name: of its class.
        config: of the model.

    Raises:
        UnsupportedModelError: with the reason.
    """
    text_config = config.get_text_config(decoder=True)
    if text_config is not config:
        raise UnsupportedModelError(
            f"{name} takes more than text: its own forward merges images or sound into the embeddings and makes the "
            f"masks, where a memory cannot come in; convert its text model ({text_config.model_type!r}) alone, which "
            "transformerfam.decoder.text_models.text_model(model) gives"
        )
    if config.model_type in NOT_SERVED:
        raise UnsupportedModelError(f"{name} is not served: {NOT_SERVED[config.model_type]}")
    if config.model_type in FAMILIES:
        reason = FAMILIES[config.model_type].refuses(config)
        if reason is not None:
            raise UnsupportedModelError(f"{name} is not served with this configuration: {reason}")
    if hasattr(config, "num_hidden_layers"):
        own_windows(config)


def own_windows(config: Any) -> list[int | None]:
    """Return every layer's own sliding window in tokens, the token itself included; None where it has none.

    Raises:
        UnsupportedModelError: a layer is neither full nor sliding attention.
    """
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * num_layers
    for layer_type in types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"the model has a layer of type {layer_type!r}{OTHER_LAYERS.get(layer_type, '')}; required are "
                "full_attention and sliding_attention"
            )
    return [window if layer_type == "sliding_attention" else None for layer_type in types]
