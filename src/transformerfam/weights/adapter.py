"""The adapter: what training adds to a model, in one folder.

`fam.safetensors` holds the prompt or prefix, the configuration, the identity of the base model, and optionally a saved
FAM; LoRA is next to it in PEFT's own files, so that PEFT loads it too.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn
from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.architecture import describe_architecture, difference
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.fam.convert import convert, memory_of
from transformerfam.fam.memory import FamMemory, FamModel
from transformerfam.fam.state import FamState
from transformerfam.files.reading import read_whole, required_form
from transformerfam.files.tensors import (
    digest_tensors,
    is_ours,
    load_tensors,
    metadata_form,
    require_finite,
    save_tensors,
)
from transformerfam.files.writing import make_folder, replacing
from transformerfam.versions import require_peft
from transformerfam.weights.folders import FAM_FILE
from transformerfam.weights.peft_adapters import (
    LORA_CONFIG_FILE,
    LORA_FILE,
    active_adapter,
    adapter_tensors,
    base_of,
    can_merge,
    has_adapters,
    inject_lora,
    merge_lora,
    set_adapter_tensors,
)

ADAPTER_FORMAT_VERSION = 1
ALWAYS_COMPARED = ("class", "model_type", "vocab_size", "hidden_size", "num_hidden_layers")
"""Of an architecture, what every version has stored; the rest is compared where it was."""

SETTLE_SECONDS = 1.0
"""How long two files that do not fit together are read again: another process may be writing the second."""


@dataclasses.dataclass
class FamAdapter:
    """Prompt or prefix, LoRA and optionally a saved FAM, apart from the base model.

    Attributes:
        config: the configuration that the memory was trained with.
        tensors: `prompt` `(F, D)` or `prefix` `(L, F, D)`; none for BSWA.
        architecture: what the base model must be.
        base_digest: SHA-256 of the base weights that it was trained on.
        base_dtype: their type, for example "float32"; None where it is not known.
        lora_config: PEFT's configuration as plain values, or None.
        lora: LoRA tensors by PEFT's names.
        saved_fam: `(L, F, D)` FAM to start readings from, or None.
        notes: free JSON values, for example how it was trained and what it was proven for.
    """

    config: FamConfig
    tensors: dict[str, torch.Tensor]
    architecture: dict[str, Any]
    base_digest: str
    lora_config: dict[str, Any] | None = None
    lora: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    saved_fam: torch.Tensor | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    base_dtype: str | None = None

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, saved_fam: FamState | None = None, notes: dict[str, Any] | None = None
    ) -> "FamAdapter":
        """Take the adapter off a converted model, which stays as it is.

        Args:
            model: converted, with or without PEFT's layers, or a `PeftModel` around it; of several adapters the one in
                force is taken.
            saved_fam: a reading whose first sequence's FAM is stored too.
            notes: free JSON values.

        Raises:
            TransformerFamError: the model is not converted, its LoRA was merged and can no longer be separated, or
                several adapters are in force at once.
        """
        model = base_of(model)
        memory = memory_of(model)
        assert memory.identity is not None
        if memory.identity.is_merged:
            raise TransformerFamError("LoRA was merged into the weights; take the adapter off an unmerged model")
        adapter = cls(
            config=memory.config,
            tensors={name: value.detach().clone() for name, value in memory.named_parameters()},
            architecture=memory.identity.architecture,
            base_digest=memory.identity.base_digest(),
            base_dtype=memory.identity.base_dtype,
            saved_fam=None if saved_fam is None else saved_fam.fams[:, 0].detach().clone(),
            notes=dict(notes or {}),
        )
        if has_adapters(model):
            name = active_adapter(model)
            adapter.lora_config = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_plain))
            adapter.lora = adapter_tensors(model, name)
        return adapter

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write the adapter into `folder`, which is made if need be.

        Args:
            folder: where to.
            dtype: type in which floating tensors are stored, for example `torch.float16`; None keeps theirs.

        Raises:
            TransformerFamError: the disk is full or the folder cannot be written; an old adapter is left as it was. Or
                the folder holds a PEFT adapter without a memory.
        """
        folder = Path(folder)
        lora_config = json.dumps(self.lora_config, indent=2, sort_keys=True) + "\n"
        self._require_own(folder, lora_config)

        def stored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: value.to(dtype or value.dtype).cpu().contiguous() for name, value in tensors.items()}

        lora, own = stored(self.lora), stored(self.tensors)
        if self.saved_fam is not None:
            own["saved_fam"] = self.saved_fam.to(dtype or self.saved_fam.dtype)
        metadata = {
            "kind": "adapter",
            "format_version": ADAPTER_FORMAT_VERSION,
            "fam_config": self.config.to_dict(),
            "architecture": self.architecture,
            "base_digest": self.base_digest,
            "base_dtype": self.base_dtype,
            "lora_config": self.lora_config,
            "lora_digest": digest_tensors(lora) if lora else None,
            "notes": self.notes,
        }
        make_folder(folder)
        with contextlib.ExitStack() as files:  # all are written before the first takes its place
            if lora:
                save_file(lora, files.enter_context(replacing(folder / LORA_FILE)))
                files.enter_context(replacing(folder / LORA_CONFIG_FILE)).write_text(lora_config, encoding="utf-8")
            save_tensors(folder / FAM_FILE, own, metadata)

    @staticmethod
    def _require_own(folder: Path, lora_config: str) -> None:
        """Refuse a folder that holds an adapter without a memory, unless a save like this one was broken off there."""
        there = [name for name in (LORA_CONFIG_FILE, LORA_FILE) if (folder / name).exists()]
        if is_ours(folder / FAM_FILE, "adapter") or not there:
            return
        if LORA_CONFIG_FILE not in there or read_whole(folder / LORA_CONFIG_FILE) != lora_config.encode():
            raise TransformerFamError(
                f"{folder} holds a PEFT adapter without a memory ({', '.join(there)}), which would be replaced; choose "
                "another folder"
            )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "FamAdapter":
        """Read an adapter that `save_pretrained` wrote.

        Raises:
            CorruptFileError: a file is missing, foreign, damaged or of another version.
        """
        folder = Path(folder)
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            tensors, metadata = load_tensors(folder / FAM_FILE, "adapter", ADAPTER_FORMAT_VERSION)
            with metadata_form(folder / FAM_FILE, "adapter"):
                lora = {} if metadata["lora_config"] is None else _load_lora(folder / LORA_FILE)
                if not lora or digest_tensors(lora) == metadata["lora_digest"]:
                    break
            if time.monotonic() > end:
                raise CorruptFileError(f"{folder / LORA_FILE} is damaged: its checksum does not match; copy it again")
            time.sleep(0.05)
        require_finite(tensors | lora, folder / FAM_FILE, "adapter")
        with metadata_form(folder / FAM_FILE, "adapter"):
            _check_metadata(metadata, tensors, lora)
            return cls(
                config=FamConfig.from_dict(metadata["fam_config"]),
                saved_fam=tensors.pop("saved_fam", None),
                tensors=tensors,
                architecture=dict(metadata["architecture"]),
                base_digest=str(metadata["base_digest"]),
                base_dtype=metadata.get("base_dtype"),
                lora_config=metadata["lora_config"],
                lora=lora,
                notes=dict(metadata["notes"]),
            )

    def apply(self, model: PreTrainedModel, merge: bool = False) -> FamModel:
        """Convert `model` and give it this memory, in place.

        Args:
            model: the base model, not converted yet.
            merge: add LoRA to the weights, which is faster and gives the same outputs; LoRA that acts on FAM rows alone
                stays apart all the same.

        Returns:
            The same object.

        Raises:
            StateMismatchError: the adapter was trained on another architecture.
            MissingPackageError: it has LoRA and PEFT is not installed.

        Warns:
            UserWarning: the base weights differ from those that it was trained on.
        """
        here, compared = describe_architecture(model), (*ALWAYS_COMPARED, *self.architecture)
        different = difference(self.architecture, {key: here.get(key) for key in compared})
        if different is not None:
            key, value_there, value_here = different
            raise StateMismatchError(
                f"adapter was trained on another model: {key} is {value_there!r} there and {value_here!r} here; apply "
                "it to the model that it was trained on"
            )
        lora_config = None if self.lora_config is None else self._peft_config(self.lora_config)
        convert(model, self.config)
        memory = memory_of(model)
        self._require_own_tensors(memory, model.get_input_embeddings().weight.shape[1])
        assert memory.identity is not None
        base_digest, base_dtype = memory.identity.base_digest(), memory.identity.base_dtype
        if base_digest != self.base_digest:
            others = f"other base weights: SHA-256 {self.base_digest[:12]} there, {base_digest[:12]} here"
            if None not in (self.base_dtype, base_dtype) and self.base_dtype != base_dtype:
                others = (
                    f"base weights in {self.base_dtype}, which are in {base_dtype} here, so it is unknown whether "
                    "they are the same"
                )
            warnings.warn(
                f"adapter was trained on {others}; it is accepted, since the architecture is the same, but may recall "
                "less",
                stacklevel=2,
            )
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                parameter.copy_(_required(self.tensors, name, parameter))
        if lora_config is not None:
            with _lora_that_fits():
                inject_lora(model, lora_config)
            set_adapter_tensors(model, self.lora)
            if merge and can_merge(model):
                merge_lora(model)
        return model

    @staticmethod
    def _peft_config(values: dict[str, Any]) -> Any:
        """Return PEFT's configuration of LoRA.

        Raises:
            CorruptFileError: the installed PEFT does not take these values.
            StateMismatchError: they are of another type of adapter.
        """
        peft = require_peft()
        if values.get("peft_type", "LORA") != "LORA":
            raise StateMismatchError(f"adapter's peft_type is {values['peft_type']!r}, required is 'LORA'")
        with _lora_that_fits():
            return peft.LoraConfig(**_known_fields(peft.LoraConfig, values))

    def _require_own_tensors(self, memory: FamMemory, hidden_size: int) -> None:
        """Refuse tensors that the memory has no place for.

        Raises:
            StateMismatchError: there is one.
        """
        unknown = sorted(self.tensors.keys() - dict(memory.named_parameters()).keys())
        if unknown:
            raise StateMismatchError(
                f"adapter has a tensor {unknown[0]!r}, which a memory with fam_init {self.config.fam_init!r} and "
                f"fam_length {self.config.fam_length} has not; make the adapter again"
            )
        expected = (len(memory.layouts), self.config.fam_length, memory.fam_width(hidden_size))
        if self.saved_fam is not None and tuple(self.saved_fam.shape) != expected:
            raise StateMismatchError(
                f"adapter's saved_fam is {tuple(self.saved_fam.shape)}, required is (layers, fam_length, width) "
                f"{expected}; take it from a state of the same model"
            )


def _lora_that_fits() -> contextlib.AbstractContextManager[None]:
    """Return `required_form` of a configuration of LoRA."""
    return required_form(
        "adapter's lora_config is not one that PEFT accepts",
        "load it with the PEFT and the model that it was made with",
    )


def _check_metadata(metadata: dict[str, Any], tensors: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> None:
    """Check what `FamAdapter.from_pretrained` reads.

    Raises:
        ValueError: it is of another form than `save_pretrained` writes; the message names the field.
    """
    lora_config = metadata["lora_config"]
    for name in ("architecture", "notes", *([] if lora_config is None else ["lora_config"])):
        if not isinstance(metadata[name], dict):
            raise ValueError(f"{name} is {metadata[name]!r}")
    if not isinstance(metadata.get("base_dtype"), str | None):
        raise ValueError(f"base_dtype is {metadata['base_dtype']!r}")
    if not all(tensor.is_floating_point() for tensor in (*tensors.values(), *lora.values())):
        raise ValueError("tensors that are not floating numbers")
    for name, value in (lora_config or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"lora_config has {name} {value}")
    rank, widest = (lora_config or {}).get("r", 0), max((max(t.shape, default=0) for t in lora.values()), default=0)
    if lora_config is not None and not (type(rank) is int and 0 < rank <= widest):
        raise ValueError(f"lora_config has r {rank!r}, and its tensors have at most {widest} rows")


def _load_lora(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(sorted(load(read_whole(path)).items()))
    except (OSError, SafetensorError) as error:
        raise CorruptFileError(f"{path} cannot be read ({error}); copy the adapter again") from error


def _plain(value: Any) -> Any:
    """Turn PEFT's sets and enumerations into JSON values."""
    return sorted(value) if isinstance(value, set) else str(value)


def _required(tensors: dict[str, torch.Tensor], name: str, like: nn.Parameter) -> torch.Tensor:
    if name not in tensors or tensors[name].shape != like.shape:
        there = tuple(tensors[name].shape) if name in tensors else "missing"
        raise StateMismatchError(f"adapter's {name} is {there}, required is {tuple(like.shape)}")
    return tensors[name]


def _known_fields(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Keep what the installed PEFT knows and needs; it computes the rest itself."""
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    return {name: value for name, value in values.items() if name in names and value is not None}
