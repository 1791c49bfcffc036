"""What happens around a layer while a piece goes through: every kind of piece overrides what it changes."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformerfam.decoder.cache_argument import as_cache


class PassingStep:
    """A step that leaves what goes through the layers as it is."""

    def enter_layer(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return a layer's input: the residual to which attention is added."""
        return hidden_BTD

    def enter_branch(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return what attention is made from, beside that residual: the input of the norm in front of it."""
        return hidden_BTD

    def masked_sight(self, layer: Any, mask: torch.Tensor) -> Any:
        """Return what a back end that knows `Sight` gets where a mask is needed."""
        return mask

    @property
    def wants_weights(self) -> bool:
        """Whether attention is to give its weights."""
        return False

    def note_weights(self, layer: Any, weights: torch.Tensor | None) -> None:
        """Take what attention gives as its weights."""

    def after_attention(self, layer: Any, output_BTD: torch.Tensor, factor: float) -> torch.Tensor:
        """Return what is added to the residual behind attention."""
        return output_BTD

    def leave_layer(self, layer: Any, hidden_BTD: torch.Tensor) -> None:
        """Note nothing."""


class StepCache(Cache):
    """The cache of one step: every layer's part of it as it is, and what its keys and values are handed to."""

    def __init__(self, layers: Sequence[Any], step: Any) -> None:
        super().__init__(layers=[])
        self.layers = list(layers)
        self.step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come with the step."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the keys and values `(B, G, T, K)` to the step and return all that it sees."""
        seen: tuple[torch.Tensor, torch.Tensor] = self.step.attend(self.layers[layer_idx], key_states, value_states)
        return seen


@contextlib.contextmanager
def _layers_keep_their_cache(decoder: Any) -> Iterator[None]:
    """Switch the checkpoints of single layers off for a pass: they leave a layer's cache out."""
    flagged = []
    if decoder.gradient_checkpointing and decoder.training:
        flagged = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in flagged:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in flagged:
            module.gradient_checkpointing = True


def run_decoder(
    decoder: nn.Module, embeddings_BTD: torch.Tensor, positions: torch.Tensor, cache: Cache, **kwargs: Any
) -> BaseModelOutputWithPast:
    """Run the class's own forward over one piece; every layer gets its mask from the piece."""
    with _layers_keep_their_cache(decoder):
        return type(decoder).forward(
            decoder,
            inputs_embeds=embeddings_BTD,
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=embeddings_BTD.dtype, device=embeddings_BTD.device),
            position_ids=positions,
            use_cache=True,
            **as_cache(cache),
            **kwargs,
        )
