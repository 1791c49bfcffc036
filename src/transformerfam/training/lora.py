"""LoRA in training: PEFT's layers, with the low-rank product added to the base layer's in place."""

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.versions import require_peft


class _LoraLinear(torch.autograd.Function):
    """`W x + b + s B A x` as one product and a second that accumulates into it.

    PEFT makes the second product, scales it and adds it: further passes over memory, which two threads do hardly faster
    than one.
    """

    @staticmethod
    def forward(
        input_ND: torch.Tensor,
        weight_OD: torch.Tensor,
        bias_O: torch.Tensor | None,
        down_RD: torch.Tensor,
        up_OR: torch.Tensor,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        low_NR = nn.functional.linear(input_ND, down_RD)
        return nn.functional.linear(input_ND, weight_OD, bias_O).addmm_(low_NR, up_OR.t(), alpha=scaling), low_NR

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        input_ND, weight_OD, _, down_RD, up_OR, ctx.scaling = inputs
        ctx.save_for_backward(input_ND, weight_OD, down_RD, up_OR, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_NO: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if grad_NO is None:
            return None, None, None, None, None, None
        input_ND, weight_OD, down_RD, up_OR, low_NR = ctx.saved_tensors
        grad_low_NR = (grad_NO @ up_OR).mul_(ctx.scaling)
        grad_input_ND = (grad_NO @ weight_OD).addmm_(grad_low_NR, down_RD) if ctx.needs_input_grad[0] else None
        grad_down_RD = grad_low_NR.t() @ input_ND
        grad_up_OR = (grad_NO.t() @ low_NR).mul_(ctx.scaling)
        return grad_input_ND, None, None, grad_down_RD, grad_up_OR, None


def fuse_lora(model: PreTrainedModel) -> int:
    """Let LoRA layers add their product in place; outputs and gradients stay PEFT's, up to rounding.

    The factors may be of another type than the base layer, as float32 factors of a bfloat16 model: products are then of
    the base layer's type, or of autocast's, and gradients of the factors' own.

    Layers with dropout, their own bias, another variant (DoRA and the like), several adapters or a trained base
    layer stay as they are.

    Args:
        model: with LoRA injected, not merged.

    Returns:
        How many layers were fused.
    """
    peft_linear = require_peft().tuners.lora.Linear
    layers = [module for module in model.modules() if type(module) is peft_linear and _can_be_fused(module)]
    for module in layers:
        module.forward = MethodType(_forward, module)
    return len(layers)


def unfuse_lora(model: PreTrainedModel) -> None:
    """Undo `fuse_lora`."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is _forward:
            del module.forward


def _can_be_fused(module: Any) -> bool:
    base, names = module.get_base_layer(), list(module.lora_A)
    if type(base) is not nn.Linear or any(p.requires_grad for p in base.parameters()):
        return False
    if len(names) != 1 or module.active_adapters != names or names[0] in module.lora_variant:
        return False
    factors = (module.lora_A[names[0]], module.lora_B[names[0]])
    is_plain = isinstance(module.lora_dropout[names[0]], nn.Identity)
    return is_plain and base.weight.is_floating_point() and all(f.bias is None for f in factors)


def _forward(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    base = module.get_base_layer()
    kind = x.device.type
    is_autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_autocast else base.weight.dtype
    if args or kwargs or module.disable_adapters or module.merged or not (is_autocast or x.dtype == dtype):
        return type(module).forward(module, x, *args, **kwargs)
    (name,) = module.active_adapters
    factors = (module.lora_A[name].weight.to(dtype), module.lora_B[name].weight.to(dtype))
    bias = None if base.bias is None else base.bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        input_ND, weight_OD = x.to(dtype).flatten(0, -2), base.weight.to(dtype)
        output = _LoraLinear.apply(input_ND, weight_OD, bias, *factors, module.scaling[name])[0]
    return output.unflatten(0, x.shape[:-1])
