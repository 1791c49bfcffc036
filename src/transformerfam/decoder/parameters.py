"""A model's parameters by their plain names, base model and memory apart, with their values wherever those are."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from transformerfam.decoder.slot import SLOTS
from transformerfam.errors import TransformerFamError

PEFT_MARKS = ("lora_", "trainable_tokens_", ".modules_to_save.")


def is_memory_parameter(name: str) -> bool:
    """Return whether a parameter belongs to a memory, or to PEFT, and not to the base model."""
    return any(mark in name for mark in (*PEFT_MARKS, *(f"{slot}." for slot in SLOTS)))


def adapters_in_force(model: Any) -> set[str]:
    """Return the names of PEFT's adapters that take part in a model's outputs."""
    named: set[str] = set()
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, list):  # of a layer of PEFT's; models have a method of this name
            named |= set(active)
    return named


def plain_names(model: Any, of_memory: bool) -> dict[str, str]:
    """Return the names of the base model's parameters, or of the memory's with the adapter in force.

    Their names are without PEFT's additions.
    """
    inactive = set(getattr(model, "peft_config", None) or ()) - adapters_in_force(model)
    chosen = {}
    for full_name, _ in model.named_parameters():
        name = full_name
        is_memory, is_original = is_memory_parameter(name), ".original_module." in name
        found = re.search(r"\.(?:lora_\w+|trainable_tokens_\w+|modules_to_save)\.([^.]+)", name)
        if is_memory == of_memory and not (is_memory and is_original) and not (found and found[1] in inactive):
            name = name if found is None else name[: found.start(1)] + "default" + name[found.end(1) :]
            plain = re.sub(r"\.modules_to_save\.default|\.(?:base_layer|original_module|token_adapter)\b", "", name)
            chosen[plain] = full_name
    return chosen


def value_of(model: Any, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter, from the CPU's memory or the disk where accelerate has offloaded it.

    Args:
        model: whose parameter it is.
        name: its full name there.
        parameter: of which only the shape is at hand where it is offloaded.

    Raises:
        TransformerFamError: no hook of accelerate's knows its value.
    """
    if parameter.device.type != "meta":
        return parameter
    parts = name.split(".")
    for place in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:place])), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            with contextlib.suppress(KeyError):
                if (stored := getattr(one, "weights_map", None)) is not None:
                    return stored[".".join(parts[place:])].to(parameter.dtype)
    require_at_hand(name, parameter)
    raise AssertionError("a parameter on device 'meta' is at hand")


class WeightValues(Mapping[str, torch.Tensor]):
    """The values of a model's parameters, of offloaded ones each when it is looked up.

    Args:
        model: whose parameters they are.
        chosen: full names in the model, by other names.
    """

    def __init__(self, model: Any, chosen: Mapping[str, str]) -> None:
        self.model = model
        self.chosen = chosen
        self.parameters = dict(model.named_parameters())

    def __getitem__(self, name: str) -> torch.Tensor:
        full_name = self.chosen[name]
        return value_of(self.model, full_name, self.parameters[full_name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)


def require_at_hand(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that is offloaded, of which only the shape is at hand.

    Raises:
        TransformerFamError: it is.
    """
    if weight.device.type == "meta":
        raise TransformerFamError(
            f"{name} is on device 'meta', as weights that accelerate offloads are, and its values are needed here; "
            "load the model without offloading it, or, to read alone, keep embeddings and memory on one by device_map"
        )
