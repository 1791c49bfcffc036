"""LoRA on FAM rows alone: tokens go through the base model's own weights.

PEFT replaces linear layers by its own, which see FAM rows and tokens side by side and do not know which is
which. The caller of a pass says how many of its first rows are FAM rows; a bound layer adds its product to those.
"""

import contextlib
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import nn

from transformerfam.decoder.slot import memory_in
from transformerfam.errors import TransformerFamError
from transformerfam.versions import require_peft


class _InFront(threading.local):
    """How many rows of what goes through the layers in this thread are FAM rows."""

    num_rows = 0


_in_front = _InFront()


@contextlib.contextmanager
def leading_rows(num_rows: int) -> Iterator[None]:
    """Say that the first `num_rows` rows of a pass are FAM rows, for the layers that `bind_lora` has bound."""
    before, _in_front.num_rows = _in_front.num_rows, num_rows
    try:
        yield
    finally:
        _in_front.num_rows = before


def bind_lora(model: nn.Module) -> None:
    """Let all LoRA of a model act on FAM rows alone; what is bound already stays so.

    Args:
        model: with PEFT's LoRA layers, or with none.

    Raises:
        TransformerFamError: LoRA is on something else than a linear layer of the decoder, or was merged.
    """
    if not getattr(model, "peft_config", None):
        return
    peft, output = require_peft(), model.get_output_embeddings()  # type: ignore[operator]
    memory = memory_in(model.get_decoder())  # type: ignore[operator]
    adapters = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper)
    for name, module in model.named_modules():
        if not isinstance(module, adapters) or _is_bound(module) or module is memory:
            continue
        if not isinstance(module, peft.tuners.lora.Linear) or module is output:
            raise TransformerFamError(
                f"fam_lora is 'rows', and the adapter has a {type(module).__name__} at {name}, where FAM rows "
                "cannot be distinguished; let it be LoRA on linear layers of the decoder alone, or set fam_lora='all'"
            )
        if module.merged:
            refuse_merge()
        module.forward = MethodType(_forward, module)
        module.merge = refuse_merge


def _is_bound(module: Any) -> bool:
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward


def refuse_merge(*_: Any, **__: Any) -> NoReturn:
    """Take the place of a bound layer's `merge`.

    Raises:
        TransformerFamError: always.
    """
    raise TransformerFamError(
        "fam_lora is 'rows': LoRA acts on FAM rows alone and cannot be merged into weights that tokens use, too; keep "
        "it apart, as load_model does"
    )


def _forward(module: Any, x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Send all rows through the base layer, and add LoRA's product to the FAM rows."""
    if x_BTD.dim() != 3:
        raise TransformerFamError(
            f"fam_lora is 'rows', and LoRA is on a layer whose input is {x_BTD.dim()}-dimensional, in which FAM rows "
            "cannot be distinguished (experts are such layers); leave it out of LoRA's targets, or set fam_lora='all'"
        )
    num_rows = _in_front.num_rows
    output: torch.Tensor = module.base_layer(x_BTD)
    if num_rows == 0 or module.disable_adapters:
        return output
    rows = x_BTD[:, :num_rows]
    active = [name for name in module.active_adapters if name in module.lora_A]
    if args or kwargs or any(name in module.lora_variant for name in active):  # PEFT's own way
        return torch.cat((type(module).forward(module, rows, *args, **kwargs), output[:, num_rows:]), dim=1)
    added = torch.zeros((), dtype=output.dtype, device=output.device)
    for name in active:
        down, up = module.lora_A[name], module.lora_B[name]
        low = down(module.lora_dropout[name](rows.to(down.weight.dtype)))
        added = added + (up(low) * module.scaling[name]).to(output.dtype)
    return torch.cat((output[:, :num_rows] + added, output[:, num_rows:]), dim=1)
