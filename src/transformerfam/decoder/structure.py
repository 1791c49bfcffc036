"""Refuse a model whose parts are not where the seams need them."""

from typing import Any

from transformers import PreTrainedModel

from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.kernels import BACK_END
from transformerfam.decoder.layouts import inverse_frequencies
from transformerfam.decoder.parameters import require_at_hand
from transformerfam.decoder.served import decoder_layers, refuse_by_configuration
from transformerfam.errors import UnsupportedModelError

ATTENTION_BACK_ENDS = ("eager", "sdpa", "flex_attention", BACK_END, *FLASH_BACK_ENDS)


def check_model(model: Any) -> None:
    """Refuse what is not a causal decoder of transformers with RoPE, whatever its family.

    Raises:
        UnsupportedModelError: with what it is, or what it has not.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}, required is a transformers model with a language-model head; load one "
            "with AutoModelForCausalLM.from_pretrained, and convert before PEFT wraps it"
        )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model, required is a decoder alone")
    refuse_by_configuration(name, model.config)
    if model.get_output_embeddings() is None or not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has no language-model head or is an encoder; required is a causal decoder, loaded with "
            "AutoModelForCausalLM"
        )
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None and inverse_frequencies(model):
        raise UnsupportedModelError(
            f"{name} keeps its rotary position embedding (RoPE) elsewhere than in its decoder's `rotary_emb`, where "
            "its angles are looked up"
        )
    if rotary is None or not inverse_frequencies(rotary) or getattr(model.config, "alibi", False):
        raise UnsupportedModelError(
            f"{name} has no rotary position embedding (RoPE), which the memory's positions need; choose a model with "
            "RoPE"
        )
    rope_type = getattr(rotary, "rope_type", None)
    rope_types = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    for rope_type in rope_types:
        if rope_type in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"RoPE of type {rope_type!r} changes with the length of the text, so keys cannot be turned; set "
                "another type"
            )


def require_layers(model: Any, num_layers: int) -> None:
    """Refuse a model whose layers are not those that it was converted with.

    Raises:
        UnsupportedModelError: there are more, or fewer.
    """
    found = len(decoder_layers(model))
    if found != num_layers:
        raise UnsupportedModelError(
            f"the model has {found} layers now and was converted with {num_layers}; change its layers first (as PEFT's "
            "layer_replication does), and convert then"
        )


def check_structure(model: Any) -> None:
    """Refuse a model of a known family whose parts are not where the seams need them.

    Raises:
        UnsupportedModelError: with the part that does not fit.
    """
    name = type(model).__name__
    if getattr(model.config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # text is causal then
        raise UnsupportedModelError(f"{name} sees later tokens (use_bidirectional_attention), required is a causal one")
    if model.config._attn_implementation not in ATTENTION_BACK_ENDS:
        raise UnsupportedModelError(
            f"attention back end is {model.config._attn_implementation!r}, required is one of "
            f"{', '.join(ATTENTION_BACK_ENDS)}; call model.set_attn_implementation('sdpa') first"
        )
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation in (
        "sdpa",
        BACK_END,
    ):
        raise UnsupportedModelError(
            f"{name} has soft caps on its attention, which attention back end 'sdpa' leaves out; load it with "
            "attn_implementation='eager'"
        )
    require_at_hand("the embedding", model.get_input_embeddings().weight)
