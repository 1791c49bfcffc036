"""A model with a memory, read as the base model that it was: full attention by the very same weights."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.kernels import BACK_END, MIXED_BACK_END
from transformerfam.decoder.memory import memory_of
from transformerfam.errors import TransformerFamError
from transformerfam.versions import require_peft


@contextlib.contextmanager
def as_base(model: PreTrainedModel) -> Iterator[Callable[..., Any]]:
    """Give the decoder of the base model, without memory, adapters and dropout, and without a second copy of weights.

    Adapters are out of force, and the attention back end is the base's, until the context ends. Nothing has gradients.

    Args:
        model: with a memory, and any number of adapters that are not merged into its weights.

    Yields:
        The forward of the base's decoder; its arguments are those of the model's class.

    Raises:
        TransformerFamError: an adapter is merged, so that the base's own weights are not there.
    """
    decoder, back_end, was_training = model.get_decoder(), model.config._attn_implementation, model.training
    with torch.no_grad(), _without_adapters(model):
        model.eval()
        _set_back_end(model, _back_end_of_base(model, back_end))
        try:
            yield functools.partial(type(decoder).forward, decoder)
        finally:
            _set_back_end(model, back_end)
            model.train(was_training)


def head_of_base(model: PreTrainedModel) -> nn.Module:
    """Return the base model's language-model head, without an adapter on it."""
    head: Any = model.get_output_embeddings()
    return head.get_base_layer() if hasattr(head, "get_base_layer") else head


def _back_end_of_base(model: PreTrainedModel, back_end: str) -> str:
    own = {BACK_END: "sdpa", MIXED_BACK_END: memory_of(model).base_back_end or "sdpa"}
    own |= {ours: name for name, ours in FLASH_BACK_ENDS.items()}
    return own.get(back_end, back_end)


def _set_back_end(model: PreTrainedModel, name: str) -> None:
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)


@contextlib.contextmanager
def _without_adapters(model: PreTrainedModel) -> Iterator[None]:
    if not getattr(model, "peft_config", None):
        yield
        return
    kind = require_peft().tuners.tuners_utils.BaseTunerLayer
    layers = [module for module in model.modules() if isinstance(module, kind)]
    merged = [layer for layer in layers if layer.merged]
    if merged:
        raise TransformerFamError(
            "an adapter is merged into the weights, which are no longer the base model's; load the model with "
            "merge=False"
        )
    is_on = [layer for layer in layers if not layer.disable_adapters]
    was_trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in is_on:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in is_on:
            layer.enable_adapters(True)
        for parameter, requires_grad in was_trained:  # which PEFT changes
            parameter.requires_grad_(requires_grad)
