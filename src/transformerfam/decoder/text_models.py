"""The text model inside a multimodal one, as a causal decoder that can be converted."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformerfam.decoder.layouts import RELATIVE_TOLERANCE, relative_error
from transformerfam.decoder.parameters import require_at_hand
from transformerfam.decoder.slot import memory_in
from transformerfam.errors import UnsupportedModelError

PROBE_LENGTH = 8


@torch.no_grad()
def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the text model inside a multimodal one as a causal decoder that has its weights, not a copy of them.

    That it gives the multimodal model's logits for text is checked with numbers. It is saved and loaded as a separate
    model. Once it is converted, the multimodal model around it reads no more.

    Args:
        model: for example a `Gemma3ForConditionalGeneration`, not converted.

    Returns:
        For example a `Gemma3ForCausalLM`, for `convert`.

    Raises:
        UnsupportedModelError: there is no other model in it, transformers has no causal decoder for it, or it gives
            other logits.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    decoder: Any = model.get_decoder()
    if config is model.config:
        raise UnsupportedModelError(f"{name} has no text model inside: it is one; convert it as it is")
    if memory_in(decoder) is not None:
        raise UnsupportedModelError("the text model is converted already; load the model again")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(
            f"transformers has no causal decoder for the text model of {name}, a {type(decoder).__name__}, which needs "
            "more than text, for example positions of images"
        )
    with torch.device("meta"):
        text: PreTrainedModel = AutoModelForCausalLM._model_mapping[type(config)](config)
    if type(getattr(text, text.base_model_prefix, None)) is not type(decoder):
        raise UnsupportedModelError(
            f"the text model of {name} is a {type(decoder).__name__}, and {type(text).__name__} has none"
        )
    setattr(text, text.base_model_prefix, decoder)
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForImageTextToText")
    text.set_output_embeddings(head)
    # The model around it has tied them or not, whatever the text model's own configuration says.
    config.tie_word_embeddings = head.weight is text.get_input_embeddings().weight
    text.generation_config = copy.deepcopy(model.generation_config)
    text.train(model.training)
    for weight_name, weight in text.named_parameters():
        require_at_hand(f"the weight {weight_name} of {type(text).__name__}", weight)
    _check_logits(model, text)
    return text


def _check_logits(model: PreTrainedModel, text: PreTrainedModel) -> None:
    was_training = model.training
    vocab_size = text.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (1, PROBE_LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    image = getattr(model.config, "image_token_id", None)
    ids[ids == image] = 0 if image != 0 else 1
    model.eval()
    text.eval()
    try:
        required, found = (each(input_ids=ids, use_cache=False).logits for each in (model, text))
    finally:
        model.train(was_training)
        text.train(was_training)
    error, limit = relative_error(found, required), RELATIVE_TOLERANCE[required.dtype]
    if not error <= limit:
        raise UnsupportedModelError(
            f"{type(text).__name__} gives other logits for text than {type(model).__name__} (relative error "
            f"{error:.1e}, allowed is {limit:.0e})"
        )
