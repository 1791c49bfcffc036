"""Every choice of the paper, one documented field each."""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from transformerfam.errors import TransformerFamError

FAM_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class FamConfig:
    """Configure block sliding window attention (BSWA) and feedback attention memory (FAM).

    `FamConfig(fam_length=0)` is BSWA alone. All lengths are in tokens.

    Raises:
        TransformerFamError: a field is out of its range or contradicts another one.

    Source: sections 2.1, 2.2, B.1 to B.4 and C.3 of arXiv 2404.09173.
    """

    block_size: int = 1024
    """Tokens per block (B)."""

    fam_length: int = 64
    """Rows of feedback attention memory per layer (F); 0 is BSWA. At most `block_size`."""

    num_memory_segments: int = 3
    """Past blocks whose keys and values every token sees (m, "M0" ... "M12" in the figures)."""

    stop_gradient: bool = False
    """Cut the gradient into the memory segments ("M1_SG")."""

    window: int | None = None
    """Transformer-XL's extra mask: a token sees the `window` last tokens, itself included, and no older one.

    FAM keys and sink tokens stay visible. None: every key of the memory segments is visible.
    """

    num_previous_fams: int = 1
    """How many past FAMs the tokens see; the update of the FAM sees the last one alone."""

    fam_position: Literal["last", "fractional", "zero"] = "last"
    """Where the FAM written by a block stands: on the block's last F positions, between this block and the next one,
    or always at position zero."""

    fam_query_position: Literal["written", "current"] = "current"
    """Where the FAM's query stands while it compresses a block: where the FAM was written (the end of the previous
    block), or where its update will stand (the end of this block)."""

    fam_init: Literal["prompt", "prefix"] = "prompt"
    """The initial FAM: a learnable prompt of F embeddings that goes up through the layers, or F learnable rows per
    layer."""

    zero_first_residual: bool = True
    """Leave the initial FAM out of the first update's residual, since it holds no context."""

    fam_copy: bool = True
    """Make the FAM's query and residual from the previous FAM. False is the static summary ("SUM FAM"): the initial
    FAM asks in every block, and no residual is added."""

    num_sink_tokens: int = 0
    """First tokens of the text whose keys stay visible for good, just in front of the memory segments."""

    fam_layers: tuple[int, ...] | None = None
    """Indices of the decoder layers that carry FAM; None is all of them. The others do BSWA alone."""

    fam_norm_bound: float | None = None
    """Largest root mean square of a FAM row; a longer row is scaled down to it after its update. None, as in the
    paper, does not bound it; `inf` is taken for None."""

    fam_key_bias: float = -32.0
    """Bias on the logits with which tokens see FAM keys; 0 is the paper's form, in which every trained memory ends.

    The default closes the memory, so that a pre-trained model keeps its language until its memory is trained: 0 costs
    SmolLM2 5.1 nats per token of a novel, -8 costs 0.07 and -16 nothing with 16 rows; with 64 rows -16 costs 0.07 and
    -32 nothing (docs/choices.md)."""

    fam_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which the FAM is kept from block to block, whatever the type of the model."""

    def __post_init__(self) -> None:
        if self.fam_layers is not None:  # JSON and TOML give lists
            object.__setattr__(self, "fam_layers", tuple(self.fam_layers))
        if self.fam_norm_bound == math.inf:  # TOML has no null
            object.__setattr__(self, "fam_norm_bound", None)
        require_field(self, "block_size", self.block_size >= 1, "at least 1")
        require_field(
            self, "fam_length", 0 <= self.fam_length <= self.block_size, f"0 to block_size ({self.block_size})"
        )
        require_field(self, "num_memory_segments", self.num_memory_segments >= 0, "at least 0")
        require_field(self, "window", self.window is None or self.window >= 1, "None or at least 1")
        require_field(self, "num_previous_fams", self.num_previous_fams >= 1, "at least 1")
        require_field(
            self,
            "num_sink_tokens",
            0 <= self.num_sink_tokens <= self.block_size,
            f"0 to block_size ({self.block_size})",
        )
        require_field(self, "fam_norm_bound", self.fam_norm_bound is None or self.fam_norm_bound > 0, "None or above 0")
        for name, allowed in (
            ("fam_position", ("last", "fractional", "zero")),
            ("fam_query_position", ("written", "current")),
            ("fam_init", ("prompt", "prefix")),
            ("fam_dtype", FAM_DTYPES),
        ):
            require_field(self, name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        if self.fam_layers is not None:
            layers = self.fam_layers
            valid = len(layers) > 0 and min(layers) >= 0 and len(set(layers)) == len(layers)
            require_field(self, "fam_layers", valid, "None or distinct layer indices, at least one")

    @property
    def num_fam_slots(self) -> int:
        """Key slots that FAMs take in every layer's cache."""
        return self.fam_length * self.num_previous_fams

    @property
    def num_memory_slots(self) -> int:
        """Key slots that sink tokens and memory segments take in every layer's cache."""
        return self.num_sink_tokens + self.num_memory_segments * self.block_size

    @property
    def num_rows(self) -> int:
        """Rows in front of the tokens of a piece that begins or completes a block."""
        return self.fam_length if self.fam_copy else 2 * self.fam_length

    def carries_fam(self, layer_idx: int) -> bool:
        """Say whether the decoder layer `layer_idx` has a FAM."""
        return self.fam_length > 0 and (self.fam_layers is None or layer_idx in self.fam_layers)

    def replace(self, **changes: Any) -> "FamConfig":
        """Return a copy with `changes`; an unknown field is refused with the nearest known one."""
        return FamConfig.from_dict({**dataclasses.asdict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FamConfig":
        """Build from plain values; an unknown field is refused with the nearest known one.

        Raises:
            TransformerFamError: `values` has a key that is no field, or a value out of range.
        """
        return cls(**values_to_fields(cls, values))


def require_field(config: Any, name: str, holds: bool, required: str) -> None:
    """Refuse a field of a configuration.

    Raises:
        TransformerFamError: `holds` is False; the message names the field, its value, and what is required.
    """
    if not holds:
        raise TransformerFamError(f"{name} is {getattr(config, name)!r}, required is {required}; change {name}")


def values_to_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return plain values, once all of them are fields of the configuration `cls`.

    Raises:
        TransformerFamError: one is not; the message has the nearest field.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; known fields are {', '.join(known)}"
            raise TransformerFamError(f"{cls.__name__} has no field {name!r}{hint}")
    return values
