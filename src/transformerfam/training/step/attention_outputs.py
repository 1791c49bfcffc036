"""The outputs of every layer's attention, noted where they arise."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.decoder.cache_argument import cache_in
from transformerfam.decoder.served import decoder_layers, family_of, part_of
from transformerfam.decoder.step import SteppedCache
from transformerfam.fam.piece import Piece


class AttentionOutputs:
    """Notes what every layer's attention gives for tokens, while it is asked to."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Register the hooks."""
        self._noted: dict[int, torch.Tensor] | None = None
        name = family_of(model).attention
        for layer_idx, layer in enumerate(decoder_layers(model)):
            note = functools.partial(self._after_attention, layer_idx)
            part_of(layer, name).register_forward_hook(note, with_kwargs=True)

    @contextlib.contextmanager
    def noted(self) -> Iterator[dict[int, torch.Tensor]]:
        """Note outputs `(B, T, D)` of tokens by number of the layer; FAM rows are left out."""
        found = self.begin()
        try:
            yield found
        finally:
            self._noted = None

    def begin(self) -> dict[int, torch.Tensor]:
        """Note from here on, into what is returned."""
        self._noted = {}
        return self._noted

    def end(self) -> dict[int, torch.Tensor]:
        """Note no longer, and return what was noted."""
        assert self._noted is not None
        noted, self._noted = self._noted, None
        return noted

    def _after_attention(
        self, layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._noted is None:
            return
        cache = cache_in(kwargs)
        if isinstance(cache, SteppedCache):
            if not isinstance(cache.step, Piece):
                return  # the initial FAM goes up alone
            self._noted[layer_idx] = output[0][:, cache.step.num_rows :]
        else:
            self._noted[layer_idx] = output[0]
