"""PEFT's adapters on a converted model: put in, taken off, loaded from PEFT's own folders, and merged."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from transformerfam.decoder.parameters import adapters_in_force
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import memory_of
from transformerfam.fam.row_lora import refuse_merge
from transformerfam.files.reading import parse_json, read_whole
from transformerfam.versions import require_peft

LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"


def base_of(model: Any) -> PreTrainedModel:
    """Return the transformers model inside of a `PeftModel`, which has PEFT's layers, or the model itself.

    Raises:
        UnsupportedModelError: the `PeftModel` keeps to itself what its adapters do.
    """
    configs = getattr(model, "peft_config", None) or {}
    for name, config in configs.items():
        require_in_layers(config, f"the adapter {name!r}")
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def require_in_layers(config: Any, what: str) -> None:
    """Refuse an adapter of PEFT's that does not act through the model's own layers alone.

    Soft prompts are held by the `PeftModel`, and so is what chooses or follows the layers of some other kinds: the
    model inside reads as if they were not there.

    Args:
        config: PEFT's, of the adapter.
        what: name of the adapter, for the message.

    Raises:
        UnsupportedModelError: it does not.
    """
    peft = require_peft()
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    tuners = peft.tuners.tuners_utils.BaseTuner, peft.AdaLoraModel
    if tuner is None or tuner.forward not in [kind.forward for kind in tuners]:
        raise UnsupportedModelError(
            f"{what} is of PEFT's type {getattr(config.peft_type, 'value', config.peft_type)}, which does not act "
            "through the model's layers alone, as a memory needs; required is LoRA or another type that does"
        )


def has_adapters(model: Any) -> bool:
    """Whether PEFT's layers are in a model."""
    return bool(getattr(model, "peft_config", None))


def active_adapter(model: PreTrainedModel) -> str:
    """Return the name of the one adapter in force.

    Raises:
        TransformerFamError: there are several at once, or none.
    """
    active = sorted(adapters_in_force(model))
    if len(active) != 1:
        raise TransformerFamError(
            f"the adapters in force are {', '.join(active) or 'none'}, required is one; choose it with "
            "set_adapter(NAME), or join them with PEFT's add_weighted_adapter"
        )
    return active[0]


def inject_lora(model: PreTrainedModel, lora_config: Any) -> None:
    """Put LoRA layers into a converted model, in place, and leave prompt or prefix trainable, too."""
    require_peft().inject_adapter_in_model(lora_config, model)
    for parameter in memory_of(model).parameters():
        parameter.requires_grad_(True)


def can_merge(model: PreTrainedModel) -> bool:
    """Whether what the adapters add can be added to the base weights.

    Not LoRA that acts on FAM rows alone, nor a bias of LoRA's (`lora_bias`) on a layer that has none.
    """
    if memory_of(model).config.fam_lora == "rows":
        return False
    return not any(
        any(getattr(module, "lora_bias", {}).values()) and getattr(module.get_base_layer(), "bias", None) is None
        for module in model.modules()
        if isinstance(getattr(module, "lora_bias", None), dict)
    )


def merge_lora(model: PreTrainedModel) -> None:
    """Add the adapter in force to the base weights, in place; outputs stay the same.

    Raises:
        TransformerFamError: it acts on FAM rows alone (`fam_lora="rows"`).
    """
    if memory_of(model).config.fam_lora == "rows":
        refuse_merge()
    identity = memory_of(model).identity
    assert identity is not None
    with identity.keeping_digests(of_memory=True):
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if any(name.startswith(f"{outer}.") and hasattr(modules[outer], _UNLOAD) for outer in _outer_names(name)):
                continue  # it goes with the module around it
            if hasattr(module, _UNLOAD):
                model.set_submodule(name, getattr(module, _UNLOAD)(merge=True, safe_merge=False, adapter_names=None))
            elif hasattr(module, "get_base_layer"):
                module.merge()
                model.set_submodule(name, module.get_base_layer())
        del model.peft_config


_UNLOAD = "unload_and_optionally_merge_module"
"""How PEFT's wrappers of whole modules and of single tokens return a module of the model's own kind."""


def _outer_names(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def adapter_tensors(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA adapter by PEFT's names.

    Raises:
        UnsupportedModelError: it is of another type.
    """
    peft, config = require_peft(), model.peft_config[name]
    if config.peft_type != peft.PeftType.LORA:
        raise UnsupportedModelError(
            f"the adapter {name!r} is of PEFT's type {config.peft_type.value}, required is LORA; save it with PEFT's "
            "own save_pretrained, and load its folder with load_model"
        )
    tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
    return {key: value.detach().clone() for key, value in tensors.items()}


def set_adapter_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of an adapter into a model whose layers for it are there.

    Raises:
        StateMismatchError: some belong nowhere, or are missing.
    """
    values = {name: value.float() for name, value in tensors.items()}
    try:
        result = require_peft().set_peft_model_state_dict(model, values)
    except KeyError as error:
        raise StateMismatchError(f"adapter has no tensor {error}, which its configuration names") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise StateMismatchError(f"adapter's LoRA does not fit its configuration and this model: {reason}") from error
    if result.unexpected_keys:
        raise StateMismatchError(f"adapter has LoRA for unknown parts: {result.unexpected_keys[:3]}")
    if missing := sorted(adapter_tensors(model, "default").keys() - values.keys()):
        raise StateMismatchError(f"adapter has no tensor {missing[0]}, which its configuration names")


def named_base(folder: Path) -> str:
    """Return what a folder of PEFT names as its base model; "" where it names none.

    Raises:
        CorruptFileError: its configuration cannot be read.
    """
    path = folder / LORA_CONFIG_FILE
    try:
        base = parse_json(read_whole(path))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(base, str | None):
        raise CorruptFileError(f"{path} has {base!r} as base_model_name_or_path, required is a text; correct it")
    return base or ""


def load_plain_peft(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Add an adapter of PEFT to the weights of a model without a memory; arguments and errors as `load_peft_folder`."""
    return _put_in(model, folder).merge_and_unload()


def load_peft_folder(model: PreTrainedModel, folder: str | os.PathLike[str], merge: bool) -> PreTrainedModel:
    """Put an adapter that PEFT's `save_pretrained` wrote into a converted model, in place.

    Args:
        model: converted.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        merge: add it to the weights, where it can be (`can_merge`).

    Returns:
        The same object.

    Raises:
        CorruptFileError: the folder has no adapter that PEFT can read, or one that lacks tensors.
        UnsupportedModelError: the adapter does not act through the model's layers alone, as soft prompts do.
        StateMismatchError: the adapter is of another model, or of a memory of another shape.
        MissingPackageError: PEFT is not installed.
    """
    _put_in(model, folder)
    if merge and can_merge(model):
        merge_lora(model)
    return model


def _put_in(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Any:
    """Put an adapter into a model, in place, and return PEFT's model around it; errors are those of its callers."""
    peft = require_peft()
    for name in (LORA_CONFIG_FILE, LORA_FILE):
        if not (Path(folder) / name).is_file():
            raise CorruptFileError(f"{folder} holds no PEFT adapter ({name} is missing); give its folder")
    try:
        require_in_layers(peft.PeftConfig.from_pretrained(folder), f"the adapter in {folder}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # which are refused
            loaded = peft.PeftModel.from_pretrained(model, folder)
        result = loaded.load_adapter(folder, "default")  # once more: it says what did not fit
    except (RuntimeError, KeyError) as error:
        raise StateMismatchError(
            f"the adapter in {folder} does not fit this model ({str(error).splitlines()[0]}); load it with the base "
            "model and the FamConfig that it was trained with"
        ) from error
    except UnsupportedModelError:
        raise
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{folder} holds no adapter that PEFT can read ({error}); copy it again") from error
    for what, names in (("lacks", result.missing_keys), ("holds", result.unexpected_keys)):
        if names:
            raise StateMismatchError(
                f"the adapter in {folder} does not fit this model: it {what} {names[0]}; load it with the base model "
                "and the FamConfig that it was trained with"
            )
    return loaded
