"""The average of memories that were trained from the same start: a "model soup".

Runs that start from one memory and differ in data or chains make different mistakes; their mean may recall what none of
them does, at the price of one. (Wortsman et al., 2022; not in the paper.)
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transformerfam.decoder.architecture import difference
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.folders import CONFIG_FILE
from transformerfam.weights.models import BASE_NOTE

UNLIKE = {"base_model_name_or_path", "inference_mode", "revision", "peft_version"}
"""Of PEFT's configuration what says nothing of the weights."""


def average_memories(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config_overrides: Mapping[str, Any] | None = None,
) -> FamAdapter:
    """Write the mean of the weights of several memories: prompt or prefix, and both factors of each LoRA.

    The factors are averaged by themselves, which keeps the rank; memories that do not come from one start have nothing
    to do with each other's factors, and their mean recalls nothing.

    Args:
        folders: two or more that `fam train` or `FamAdapter.save_pretrained` wrote.
        output: folder of the mean, stored in float16 as `fam train` stores a memory.
        config_overrides: fields of `FamConfig` to read with; the others are those of the first memory.

    Returns:
        The adapter that was written; its notes hold those of all memories.

    Raises:
        TransformerFamError: there is one folder only, the output is one of them, or a memory starts from a saved FAM.
        StateMismatchError: the memories differ in base model, LoRA or shape.
        CorruptFileError: a folder holds no memory that can be read.
    """
    if len(folders) < 2:
        raise TransformerFamError(f"{len(folders)} memory cannot be averaged; give two or more folders")
    for folder in folders:
        if Path(folder).resolve() == Path(output).resolve():
            raise TransformerFamError(
                f"the output {output} is one of the memories that are averaged, which would be lost; choose another"
            )
        if (Path(folder) / CONFIG_FILE).is_file():
            raise TransformerFamError(
                f"{folder} holds a whole model, required are memories for a base model, such as LoRA and a prompt; "
                "average those"
            )
    memories = [FamAdapter.from_pretrained(folder) for folder in folders]
    first = memories[0]
    for folder, memory in zip(folders, memories, strict=True):
        if memory.saved_fam is not None:
            raise TransformerFamError(f"{folder} starts from a saved FAM, which has no average; save it without one")
        for part, there, here in _parts(memory, first, config_overrides or {}):
            if there != here:
                raise StateMismatchError(
                    f"{folder} and {folders[0]} differ in {part}: {there} and {here}; average memories of one base "
                    "model and one shape"
                )
    average = FamAdapter(
        config=first.config.replace(**dict(config_overrides or {})),
        tensors=_mean([memory.tensors for memory in memories]),
        architecture=first.architecture,
        base_digest=first.base_digest,
        lora_config=first.lora_config,
        lora=_mean([memory.lora for memory in memories]),
        notes={
            BASE_NOTE: first.notes.get(BASE_NOTE),
            "max_training_filler_tokens": max(m.notes.get("max_training_filler_tokens", 0) for m in memories),
            "average_of": [memory.notes for memory in memories],
        },
    )
    average.save_pretrained(output, dtype=torch.float16)
    return average


def _parts(memory: FamAdapter, first: FamAdapter, overrides: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what must agree: its name, in `memory` and in `first`."""

    def fields(adapter: FamAdapter) -> dict[str, Any]:
        return {name: value for name, value in adapter.config.to_dict().items() if name not in overrides}

    def lora(adapter: FamAdapter) -> dict[str, Any]:
        return {name: value for name, value in (adapter.lora_config or {}).items() if name not in UNLIKE}

    def shapes(adapter: FamAdapter) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in (adapter.tensors | adapter.lora).items()}

    return [
        ("architecture", *_architectures(memory.architecture, first.architecture)),
        ("base weights", memory.base_digest[:12], first.base_digest[:12]),
        ("LoRA", *_difference(lora(memory), lora(first))),
        ("FamConfig", *_difference(fields(memory), fields(first))),
        ("shapes", *_difference(shapes(memory), shapes(first))),
    ]


def _architectures(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the entry in which two architectures differ, of each, or nothing twice."""
    different = difference(there, here)
    return ({}, {}) if different is None else ({different[0]: different[1]}, {different[0]: different[2]})


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of either that the other does not have, or has with another value."""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return {name: there.get(name) for name in names}, {name: here.get(name) for name in names}


def _mean(tensors: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of each tensor, in float32."""
    return {name: torch.stack([part[name].float() for part in tensors]).mean(dim=0) for name in tensors[0]}
