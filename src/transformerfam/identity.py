"""Which model a state or an adapter was made on: architecture, and digests of the weights."""

import dataclasses
import json
import re
import warnings
from typing import Any

from transformerfam.config import FamConfig
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.files import digest_tensors

ARCHITECTURE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "tie_word_embeddings",
)

MEMORY_PREFIXES = ("fam.", "rival.")
LORA_MARK = "lora_"


def is_memory_parameter(name: str) -> bool:
    """Say whether a parameter belongs to the memory (prompt, prefix, a rival's, LoRA) and not to the base model."""
    return LORA_MARK in name or any(prefix in name for prefix in MEMORY_PREFIXES)


def describe_architecture(model: Any) -> dict[str, Any]:
    """Return what two models must share so that a state of one fits the other, as JSON values."""
    values = model.config.to_dict()
    chosen = {"class": type(model).__name__} | {key: values.get(key) for key in ARCHITECTURE_KEYS}
    return json.loads(json.dumps(chosen))


def _in_todays_fields(values: dict[str, Any], config: FamConfig) -> dict[str, Any]:
    """Return a stored configuration with the fields that have come since, and former ones in their place."""
    try:
        return type(config).from_dict(values).to_dict()
    except TransformerFamError:  # of a version to come; the difference is named
        return values


def _plain_name(name: str) -> str:
    """Return a parameter's name without what PEFT puts around it."""
    return re.sub(r"\.modules_to_save\.[^.]+", "", name.replace(".base_layer", ""))


@dataclasses.dataclass
class ModelIdentity:
    """Tell one converted model from another.

    Architecture and configuration must be equal; weights may differ, with a warning that names the difference.
    """

    model: Any
    architecture: dict[str, Any]
    base_digest_before_merge: str | None = None
    """Digest of the base weights, kept when LoRA was merged into them."""
    memory_digest_before_merge: str | None = None
    """Digest of prompt and LoRA, kept when LoRA was merged."""
    _cache: dict[bool, tuple[tuple[Any, ...], str]] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelIdentity":
        """Go with a copy of the model; a copy of the memory alone, as PEFT makes it, stays with the model."""
        return dataclasses.replace(self, model=memo.get(id(self.model), self.model), _cache={})

    def base_digest(self) -> str:
        """Return the SHA-256 of the base model's weights, without prompt and LoRA."""
        return self.base_digest_before_merge or self._digest(of_memory=False)

    def memory_digest(self) -> str:
        """Return the SHA-256 of the weights that make the memory: prompt or prefix, and LoRA."""
        return self.memory_digest_before_merge or self._digest(of_memory=True)

    def _digest(self, of_memory: bool) -> str:
        chosen = {
            _plain_name(name): parameter
            for name, parameter in self.model.named_parameters()
            if is_memory_parameter(name) == of_memory and ".original_module." not in name
        }
        versions = tuple((name, value.data_ptr(), value._version) for name, value in chosen.items())
        cached = self._cache.get(of_memory)
        if cached is None or cached[0] != versions:
            cached = (versions, digest_tensors(chosen))
            self._cache[of_memory] = cached
        return cached[1]

    def to_metadata(self, config: FamConfig) -> dict[str, Any]:
        """Return everything that `check` compares, as JSON values."""
        return {
            "architecture": self.architecture,
            "fam_config": config.to_dict(),
            "base_digest": self.base_digest(),
            "memory_digest": self.memory_digest(),
        }

    def check(self, metadata: dict[str, Any], config: FamConfig, what: str) -> None:
        """Compare this model with the one that `metadata` was made on.

        Args:
            metadata: what `to_metadata` gave when the file was written.
            config: the configuration in force.
            what: name of the thing being loaded, for messages.

        Raises:
            StateMismatchError: architecture or configuration differ.

        Warns:
            UserWarning: only the weights differ.
        """
        for part, here, there in (
            ("architecture", self.architecture, metadata["architecture"]),
            ("fam_config", config.to_dict(), _in_todays_fields(metadata["fam_config"], config)),
        ):
            different = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]
            if different:
                key = different[0]
                raise StateMismatchError(
                    f"{what} was made on another {part.replace('_', ' ')}: {key} is {there.get(key)!r} there and "
                    f"{here.get(key)!r} here; load it into the model and configuration that it was made on"
                )
        weights = (
            ("base_digest", self.base_digest(), "base weights"),
            ("memory_digest", self.memory_digest(), "memory weights (prompt and LoRA)"),
        )
        others = [
            f"{name} (SHA-256 {metadata[part][:12]} there, {digest[:12]} here)"
            for part, digest, name in weights
            if metadata[part] != digest
        ]
        if others:
            warnings.warn(
                f"{what} was made on other {' and '.join(others)}; it is accepted, since the architecture is the same, "
                "but may recall less",
                stacklevel=3,
            )
