"""Which model a state or an adapter was made on: architecture, and digests of the weights."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from transformerfam.config import FamConfig
from transformerfam.decoder.architecture import describe_architecture, difference
from transformerfam.decoder.parameters import WeightValues, is_memory_parameter, plain_names
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.files.tensors import digest_tensors

NUM_PAST = 32
"""Former weights of which an identity remembers digests."""

SEVERAL = "several"
"""In place of a digest: weights were changed while a text was read, or before its state was saved."""


def _in_todays_fields(values: dict[str, Any], config: FamConfig) -> dict[str, Any]:
    """Return a stored configuration with the fields that have come since, and former ones in their place."""
    try:
        return type(config).from_dict(values).to_dict()
    except TransformerFamError:  # of a version to come; the difference is named
        return values


ReadWith = dict[str, Any]
"""Of the base weights and of the memory's what a text was read with: a key of `weights_keys`, or `SEVERAL`."""


@dataclasses.dataclass(frozen=True)
class UnboundIdentity:
    """The identity of a state that came out of a pickle, until a model continues it.

    Attributes:
        metadata: what `ModelIdentity.to_metadata` gave.
    """

    metadata: dict[str, Any]

    @property
    def architecture(self) -> dict[str, Any]:
        """What two models must share."""
        architecture: dict[str, Any] = self.metadata["architecture"]
        return architecture

    @property
    def model(self) -> Any:
        """Refuse: there is none yet.

        Raises:
            StateMismatchError: always.
        """
        raise StateMismatchError(
            "the state came out of a pickle and has no model yet; give it to one with model.read(ids, state) or "
            "model(ids, past_key_values=state) first"
        )

    def to_metadata(self, config: Any, read_with: ReadWith | None = None) -> dict[str, Any]:
        """Return everything that `ModelIdentity.check` compares, as JSON values: what the text was read with."""
        return self.metadata | {"fam_config": config.to_dict()}


@dataclasses.dataclass
class ModelIdentity:
    """Tell one converted model from another.

    Architecture and configuration must be equal; weights may differ, with a warning that names the difference.
    """

    model: Any
    _kept: dict[bool, tuple[str, tuple[Any, ...] | None]] = dataclasses.field(default_factory=dict)
    """Digests from before LoRA was merged or types were changed, and the weights' versions since; None: take them."""
    _cache: dict[bool, tuple[tuple[Any, ...], str]] = dataclasses.field(default_factory=dict)
    _past: dict[tuple[str, Any], str] = dataclasses.field(default_factory=dict)
    """Digests by part and key of `weights_keys`, the last few."""

    @property
    def architecture(self) -> dict[str, Any]:
        """What two models must share, as the model is now: embeddings may be resized."""
        return describe_architecture(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelIdentity":
        """Go with a copy of the model; a copy of the memory alone, as PEFT makes it, stays with the model."""
        model = memo.get(id(self.model), self.model)
        return dataclasses.replace(self, model=model, _cache={}, _past={}, _kept=self._portable())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}, "_past": {}, "_kept": self._portable()}

    def _portable(self) -> dict[bool, tuple[str, tuple[Any, ...] | None]]:
        """Return the kept digests that still hold, for a copy, whose parameters are others."""
        return {part: (digest, None) for part, (digest, _) in self._kept.items() if self._digest(part) == digest}

    @property
    def is_merged(self) -> bool:
        """Whether LoRA was merged into the base weights."""
        return True in self._kept

    def weights_key(self) -> tuple[Any, ...]:
        """Return what changes with the weights in force, and costs no look at their values.

        It does not change with what is written past autograd's counting, into `parameter.data`.
        """
        return tuple(self.weights_keys().values())

    def weights_keys(self) -> dict[str, tuple[Any, ...]]:
        """Return `weights_key` by part: of the base model, and of the memory with the adapters in force."""
        adapters = tuple(
            (tuple(module.active_adapters), module.disable_adapters, *sorted(getattr(module, "scaling", {}).items()))
            for module in _adapter_layers(self.model)
        )
        return {
            "base_digest": self._versions(of_memory=False),
            "memory_digest": (self._versions(of_memory=True), adapters),
        }

    def read_with(self, before: ReadWith, noted: "ModelIdentity") -> ReadWith:
        """Return what a text was read with that is read on with the weights in force.

        Args:
            before: what it was read with so far.
            noted: identity that noted it, of the same model, as PEFT has them per adapter.
        """
        self._past |= noted._past
        keys, has_values = self.weights_keys(), not isinstance(next(self.model.parameters()), FakeTensor)
        if has_values and not torch.is_grad_enabled() and ("memory_digest", keys["memory_digest"]) not in self._past:
            self._note_digest("memory_digest", keys["memory_digest"])  # which is small; adapters are switched
        return {
            part: key if before.get(part) in (None, key) or self._are_one(part, before[part], key) else SEVERAL
            for part, key in keys.items()
        }

    def _are_one(self, part: str, before: Any, key: tuple[Any, ...]) -> bool:
        digest = self._past.get((part, before))
        return digest is not None and digest == self._note_digest(part, key)

    def _note_digest(self, part: str, key: tuple[Any, ...]) -> str:
        """Note the digest of the weights in force by their key, and return it."""
        digest = self._digest(of_memory=part == "memory_digest")
        self._past[part, key] = digest
        for oldest in list(self._past)[:-NUM_PAST]:  # of a list, since threads may note at the same time
            self._past.pop(oldest, None)
        return digest

    @contextlib.contextmanager
    def keeping_digests(self, of_memory: bool) -> Iterator[None]:
        """Keep the digests as they are while LoRA is merged or types change in the body, until the weights are trained.

        Args:
            of_memory: keep that of the memory, too.
        """
        kept = {False: self.base_digest()} | ({True: self.memory_digest()} if of_memory else {})
        for part, key in self.weights_keys().items():
            self._note_digest(part, key)
        yield
        self._kept |= {part: (digest, self._versions(part)) for part, digest in kept.items()}

    def _versions(self, of_memory: bool) -> tuple[Any, ...]:
        return tuple(
            (name, _version(parameter))
            for name, parameter in self.model.named_parameters()
            if is_memory_parameter(name) == of_memory
        )

    @property
    def base_dtype(self) -> str | None:
        """The type of the weights that `base_digest` is of, for example "float32"; None where they had another once."""
        if False in self._kept:
            return None
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def base_digest(self) -> str:
        """Return the SHA-256 of the base model's weights, without prompt and LoRA."""
        return self._digest(of_memory=False)

    def memory_digest(self) -> str:
        """Return the SHA-256 of the weights that make the memory: prompt or prefix, and LoRA."""
        return self._digest(of_memory=True)

    def _digest(self, of_memory: bool) -> str:
        if of_memory in self._kept:
            (digest, then), now = self._kept[of_memory], self._versions(of_memory)
            if then in (None, now):
                self._kept[of_memory] = digest, now
                return digest
        chosen = plain_names(self.model, of_memory)
        if of_memory and _adapters_are_off(self.model):
            chosen = {name: full_name for name, full_name in chosen.items() if ".lora_" not in full_name}
        values = WeightValues(self.model, chosen)
        parameters = {name: values.parameters[full_name] for name, full_name in chosen.items()}
        versions = tuple(
            (name, value.data_ptr(), None if value.is_inference() else value._version)
            for name, value in parameters.items()
        )
        cached = self._cache.get(of_memory)
        if cached is None or cached[0] != versions:
            cached = (versions, digest_tensors(values))
            self._cache[of_memory] = cached
        return cached[1]

    def to_metadata(self, config: FamConfig, read_with: ReadWith | None = None) -> dict[str, Any]:
        """Return everything that `check` compares, as JSON values.

        Args:
            config: of the memory.
            read_with: weights that a text was read with; those in force where it is left out.
        """
        metadata: dict[str, Any] = {"architecture": self.architecture, "fam_config": config.to_dict()}
        for part, key in self.weights_keys().items():
            before = (read_with or {}).get(part, key)
            metadata[part] = self._note_digest(part, key) if before == key else self._past.get((part, before), SEVERAL)
        return metadata

    def check(self, metadata: dict[str, Any], config: FamConfig, what: str) -> ReadWith:
        """Compare this model with the one that `metadata` was made on.

        Args:
            metadata: what `to_metadata` gave when the file was written.
            config: the configuration in force.
            what: name of the thing being loaded, for messages.

        Returns:
            What the text was read with so far: `SEVERAL` for a part of the weights that differs.

        Raises:
            StateMismatchError: architecture or configuration differ.

        Warns:
            UserWarning: only the weights differ.
        """
        for part, here, there in (
            ("architecture", self.architecture, metadata["architecture"]),
            ("fam config", config.to_dict(), _in_todays_fields(metadata["fam_config"], config)),
        ):
            different = difference(there, here)
            if different is not None:
                key, value_there, value_here = different
                raise StateMismatchError(
                    f"{what} was made on another {part}: {key} is {value_there!r} there and {value_here!r} here; load "
                    "it into the model and configuration that it was made on"
                )
        return self.warn_of_weights(metadata, what)

    def warn_of_weights(self, metadata: dict[str, Any], what: str) -> ReadWith:
        """Warn where something was made on other weights; arguments and result are those of `check`."""
        names = {"base_digest": "base weights", "memory_digest": "memory weights (prompt and LoRA)"}
        keys, others = self.weights_keys(), {}
        for part, name in names.items():
            digest = self._note_digest(part, keys[part])
            if metadata[part] != digest:
                others[part] = f"{name} ({_digest_there(metadata[part])} there, {digest[:12]} here)"
        if others:
            warnings.warn(
                f"{what} was made on other {' and '.join(others.values())}; it is accepted, since the architecture is "
                "the same, but may recall less",
                stacklevel=3,
            )
        return keys | dict.fromkeys(others, SEVERAL)


def _adapter_layers(model: Any) -> list[Any]:
    """Return the layers that PEFT has put adapters into."""
    if not getattr(model, "peft_config", None):
        return []
    return [module for module in model.modules() if isinstance(getattr(module, "active_adapters", None), list)]


def _adapters_are_off(model: Any) -> bool:
    """Whether PEFT has switched all adapters off, so that the memory is read without them."""
    layers = _adapter_layers(model)
    return bool(layers) and all(layer.disable_adapters for layer in layers)


def _version(parameter: torch.Tensor) -> tuple[int, int | None] | None:
    """Return what changes when a parameter does; None of one that is offloaded, which is another tensor each time."""
    if parameter.device.type == "meta":
        return None
    return id(parameter), None if parameter.is_inference() else parameter._version


def _digest_there(digest: str) -> str:
    return "several, one after the other" if digest == SEVERAL else f"SHA-256 {digest[:12]}"
