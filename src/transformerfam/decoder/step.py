"""What happens around a layer while a piece goes through, and the cache that hands keys and values to it."""

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from transformerfam.decoder.cache_argument import as_cache


class Step(abc.ABC):
    """One piece on its way through the layers: every kind of piece overrides what it changes.

    `layer` is what the cache has of the layer at hand (`Cache.layers`), of another type for every kind of piece.
    """

    @abc.abstractmethod
    def attend(self, layer: Any, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the piece's keys and values, and return all that it sees."""

    @abc.abstractmethod
    def sight(self, layer: Any) -> Any:
        """Return what the rows see, for the back ends that need no mask; None where they need one."""

    @abc.abstractmethod
    def mask(self, layer: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return what the rows see, as a bias on their logits."""

    def masked_sight(self, layer: Any, mask: torch.Tensor) -> Any:
        """Return what a back end that knows `Sight` gets where a mask is needed."""
        return mask

    def enter_layer(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return a layer's input: the residual to which attention is added."""
        return hidden_BTD

    def enter_branch(self, layer: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return what attention is made from, besides that residual: the input of the norm in front of it."""
        return hidden_BTD

    @property
    def wants_weights(self) -> bool:
        """Whether attention is to give its weights."""
        return False

    def note_weights(self, layer: Any, weights: torch.Tensor | None) -> None:
        """Take what attention gives as its weights."""
        return

    def after_attention(self, layer: Any, output_BTD: torch.Tensor, factor: float) -> torch.Tensor:
        """Return what is added to the residual after attention."""
        return output_BTD

    def leave_layer(self, layer: Any, hidden_BTD: torch.Tensor) -> None:
        """Note what came out of a layer."""
        return

    def advance(self, hidden_BTD: torch.Tensor) -> None:
        """Move on what the piece belongs to, once it is through.

        Args:
            hidden_BTD: all rows after the last norm.
        """
        return


class SteppedCache(Cache):
    """A cache whose keys and values a step takes.

    Attributes:
        step: the piece that is going through the model; None between two.
    """

    step: Step | None = None


class StepCache(SteppedCache):
    """The cache of one step: every layer's part of it as it is, and what its keys and values are handed to."""

    def __init__(self, layers: Sequence[Any], step: Step) -> None:
        super().__init__(layers=[])
        self.layers = list(layers)
        self.step: Step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions come with the step."""
        return 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the keys and values `(B, G, T, K)` to the step and return all that it sees."""
        return self.step.attend(self.layers[layer_idx], key_states, value_states)


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
