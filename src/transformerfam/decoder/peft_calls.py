"""What PEFT hands to its layers with a call, which the pieces of a reading cannot carry."""

from typing import Any

from torch import nn

from transformerfam.errors import TransformerFamError


def refuse_adapters_by_place(model: nn.Module) -> None:
    """Refuse adapters that act on some rows or some tokens of a call alone.

    PEFT gives its layers the indices in the call; the layers see pieces of it, with FAM rows in front.

    Args:
        model: with PEFT's layers, or with none.

    Raises:
        TransformerFamError: the call was given `adapter_names`, or an adapter in force is an activated LoRA.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return
    for module in model.modules():
        if hasattr(module, "active_adapters") and hasattr(module, "base_layer"):  # the first layer says it for all
            _refuse(module, configs)
            return


def _refuse(layer: Any, configs: dict[str, Any]) -> None:
    names = [getattr(hook, "keywords", {}).get("adapter_names") for hook in layer._forward_pre_hooks.values()]
    if any(names):
        raise TransformerFamError(
            f"adapter_names is {names[0]}, required is one adapter for all rows of a batch, which share their "
            "initial FAM; choose it with set_adapter(NAME), and read other rows in another batch"
        )
    for name in layer.active_adapters:
        tokens = getattr(configs.get(name), "alora_invocation_tokens", None)
        if tokens:
            raise TransformerFamError(
                f"adapter {name!r} has alora_invocation_tokens={list(tokens)}, from which on it acts, and a piece of a "
                "reading does not know where in the call they are; required is an adapter that acts on all tokens"
            )
