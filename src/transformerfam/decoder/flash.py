"""Attention of a piece by flash attention 2 or 3: the back ends `fam_fa2` and `fam_fa3`, which take no mask at all.

FAM rows are one call without a mask, tokens one causal call, which flash attention ends at the last key; layers that
keep their own window have it as flash attention's window. What needs a mask is refused.

No machine of ours has run flash attention itself: the calls are tested against a plain emulation of what it promises.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flash_attention
from transformers.masking_utils import flash_attention_mask

from transformerfam.decoder.kernels import Sight, asking_rows, attend_rows
from transformerfam.errors import TransformerFamError

FLASH_BACK_ENDS = {"flash_attention_2": "fam_fa2", "flash_attention_3": "fam_fa3"}
"""transformers' names, and those of a converted model."""


def attend_piece_by_flash(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: "Sight | torch.Tensor | None",
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend from FAM rows and tokens, in transformers' attention interface; shapes are those of `attend_piece`.

    Args:
        implementation: transformers' name of the flash attention that computes.
        module: the attention layer.
        query: FAM rows first.
        key: all keys in sight; those of the tokens are the last.
        value: likewise.
        attention_mask: a `Sight`; a `(B, T)` mask or None outside of pieces, as for a model that is not converted.
        dropout: probability that an attention weight is dropped.
        scaling: factor on the logits.
        sliding_window: of the layer; used outside of pieces, since a piece brings its own.
        **kwargs: passed on to flash attention: soft caps, sinks.

    Raises:
        TransformerFamError: the piece needs a dense mask.
    """

    def call(rows: slice, keys: slice, is_causal: bool, window: int | None, mask: Any = None) -> torch.Tensor:
        # transformers' function reads the name of the kernels off the layer.
        layer = SimpleNamespace(
            config=SimpleNamespace(_attn_implementation=implementation),
            is_causal=is_causal,
            layer_idx=getattr(module, "layer_idx", None),
            modules=module.modules,
        )
        output: torch.Tensor = flash_attention.flash_attention_forward(
            layer,
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=window,
            is_causal=is_causal,
            **{name: given for name, given in kwargs.items() if name != "is_causal"},
        )[0]
        return output

    everything = slice(None)
    mask = attention_mask.mask if isinstance(attention_mask, Sight) else attention_mask
    if not isinstance(attention_mask, Sight) or mask is not None:
        if mask is not None and mask.dim() == 4:
            raise TransformerFamError(
                "flash attention takes no mask, which this piece needs: sequences at different places "
                "(padding), fam_key_bias other than 0, a window on a layer with FAM, or compiled decoding; set "
                "model.set_attn_implementation('fam') before"
            )
        return call(everything, everything, True, sliding_window, mask), None
    num_rows = attention_mask.num_rows
    tokens = call(slice(num_rows, None), everything, True, attention_mask.window)
    if not num_rows:
        return tokens, None
    if attention_mask.first_block_key is not None:  # flash attention gives no weights
        soft_cap, sinks_H = kwargs.get("softcap"), kwargs.get("s_aux")
        rows, share = attend_rows(
            asking_rows(query, attention_mask), key, value, attention_mask, dropout, scaling, soft_cap, sinks_H
        )
        return torch.cat((rows.to(tokens.dtype), tokens), dim=1), share
    query = torch.cat((asking_rows(query, attention_mask), query[:, :, num_rows:]), dim=2)
    rows = call(slice(num_rows), slice(attention_mask.first_row_key, None), False, None)
    return torch.cat((rows, tokens), dim=1), None


def _with_kernels(implementation: str) -> Any:
    def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return attend_piece_by_flash(implementation, *args, **kwargs)

    return attend


for _name, _own in FLASH_BACK_ENDS.items():
    AttentionInterface.register(_own, _with_kernels(_name))
    AttentionMaskInterface.register(_own, flash_attention_mask)
