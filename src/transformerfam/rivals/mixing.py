"""The attention back end of rivals that add their memory to what an attention gives."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from transformerfam.decoder.kernels import MIXED_BACK_END
from transformerfam.decoder.served import family_of
from transformerfam.errors import UnsupportedModelError


class Mixture:
    """What the back end for rivals that mix gets in the mask's place: the piece, and the layer it goes through."""

    def __init__(self, piece: Any, layer: int) -> None:
        self.piece, self.layer = piece, layer


def attend_and_mix(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mixture | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with torch's attention, and let the rival add what its memory gives: a back end of transformers."""
    if not isinstance(attention_mask, Mixture):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    piece, layer = attention_mask.piece, attention_mask.layer
    mask = piece.mask(layer, query.dtype, query.device)
    output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    return piece.rival.mix(piece, layer, query, output), None


AttentionInterface.register(MIXED_BACK_END, attend_and_mix)
AttentionMaskInterface.register(MIXED_BACK_END, sdpa_mask)


def require_plain_heads(rival: Any, model: PreTrainedModel) -> None:
    """Refuse a model whose queries and keys a memory of the attention's own heads cannot take.

    Raises:
        UnsupportedModelError: latent attention, or attention that does not go through transformers' interface as
            torch's own.
    """
    name, system = type(model).__name__, rival.config.system
    if any(layout.turner.is_in_values for layout in rival.layouts):
        raise UnsupportedModelError(f"{name} carries latents, and {system} needs the heads' own keys and values")
    if not family_of(model).has_attention_interface:
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention interface, in which {system} adds "
            "its memory"
        )
    if model.config._attn_implementation != "sdpa":
        raise UnsupportedModelError(
            f"attention back end is {model.config._attn_implementation!r}, required for {system} is 'sdpa'"
        )
