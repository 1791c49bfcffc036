"""The rivals' configuration, one documented field each."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transformerfam.errors import TransformerFamError
from transformerfam.fields import require_field, require_types, values_to_fields

RivalName = Literal[
    "full", "rmt", "autocompressor", "feedback_segment", "block_recurrent", "infini", "armt", "gated_linear"
]
RIVAL_NAMES: tuple[str, ...] = get_args(RivalName)


@dataclass(frozen=True, kw_only=True)
class RivalConfig:
    """Configure a system that TransformerFAM is compared with. All lengths are in tokens.

    Raises:
        TransformerFamError: a field is out of its range.

    Source: sections 4 and C of arXiv 2404.09173, and the paper named in each system's module.
    """

    system: RivalName
    """Which system it is."""

    block_size: int = 1024
    """Tokens of a segment; full attention has no segments and only reads so many at a time."""

    num_memory_tokens: int = 64
    """Rows of memory: read and write tokens (rmt), summary tokens of a segment (autocompressor), memory tokens (armt),
    state vectors (block_recurrent)."""

    num_memory_segments: int = 1
    """Past segments whose outputs are seen (feedback_segment)."""

    use_delta_rule: bool = True
    """Write only what the memory does not hold yet (infini)."""

    initial_gate: float = 0.5
    """Share of the memory, against local attention, before training (infini, gated_linear), between 0 and 1."""

    recurrent_layer: int | None = None
    """Index of the layer with the state (block_recurrent); None is the layer at ten twelfths, as in its paper."""

    association_width: int = 64
    """Width of keys and queries of the associative memory (armt)."""

    num_feature_shifts: int = 3
    """Shifts of the feature map DPFP (armt)."""

    decay_rank: int = 16
    """Rank of the projection that makes the decay (gated_linear)."""

    decay_temperature: float = 16.0
    """Root that is taken of the decay (gated_linear)."""

    def __post_init__(self) -> None:
        at_least_one = (
            "block_size",
            "num_memory_tokens",
            "num_memory_segments",
            "association_width",
            "num_feature_shifts",
            "decay_rank",
        )
        require_types(self)
        for name in at_least_one:
            require_field(self, name, getattr(self, name) >= 1, "at least 1")
        require_field(self, "initial_gate", 0 < self.initial_gate < 1, "between 0 and 1")
        require_field(self, "decay_temperature", self.decay_temperature > 0, "above 0")
        layer = self.recurrent_layer
        require_field(self, "recurrent_layer", layer is None or layer >= 0, "None or at least 0")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RivalConfig":
        """Build from plain values; an unknown field is refused with the nearest known one.

        Raises:
            TransformerFamError: `values` has a key that is no field, a value out of range, or no system.
        """
        fields = values_to_fields(cls, values)
        if "system" not in fields:
            raise TransformerFamError(f"system is missing, required is one of {', '.join(RIVAL_NAMES)}")
        return cls(**fields)
