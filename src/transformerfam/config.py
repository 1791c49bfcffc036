"""Every choice of the paper, one documented field each."""

import dataclasses
import json
import math
from dataclasses import InitVar, dataclass
from typing import Any, Literal

from transformerfam.errors import TransformerFamError
from transformerfam.fields import require_field, require_types, values_to_fields

LARGEST_BOUND = 1e18
"""Of `fam_norm_bound`: its square is a float32."""
FAM_DTYPES = ("float32", "bfloat16", "float16")

UPDATE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "gated": {
        "fam_update": "gated",
        "fam_query": "below",
        "fam_residual": "below",
        "fam_feeds": "slots",
        "fam_share": "head",
        "fam_share_threshold": 0.5,
        "fam_value": "block",
        "fam_key_bias": 0.0,
    },
    "gated_slots": {
        "fam_update": "gated",
        "fam_query": "below",
        "fam_residual": "below",
        "fam_feeds": "slots",
        "fam_share": "head",
        "fam_key_bias": 0.0,
    },
    "gated_rows": {
        "fam_update": "gated",
        "fam_query": "initial",
        "fam_residual": "initial",
        "fam_feeds": "next",
        "fam_key_bias": 0.0,
    },
}
"""What differs from the defaults, by name: the paper's update; ours with slots for means of the block's keys and
values, with slots for those of the rows, and with hidden states."""

PLAIN_UPDATE: dict[str, Any] = {
    "fam_update": "paper",
    "fam_query": "previous",
    "fam_residual": "previous",
    "fam_feeds": "same",
    "fam_share": "row",
    "fam_share_threshold": 0.0,
    "fam_value": "rows",
    "fam_lora": "all",
}
"""The paper's update in full."""


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
    """Where the FAM written by a block is: on the block's last F positions, between this block and the next one,
    or always at position zero."""

    fam_query_position: Literal["written", "current"] = "current"
    """Where the FAM's query is while it compresses a block: where the FAM was written (the end of the previous
    block), or where its update will be (the end of this block)."""

    fam_init: Literal["prompt", "prefix"] = "prompt"
    """The initial FAM: a learnable prompt of F embeddings that goes up through the layers, or F learnable rows per
    layer."""

    fam_starts_empty: bool = False
    """Begin a reading with a memory that nobody sees: in its first block tokens and FAM rows see no FAM, so the base
    model reads a text of up to one block as ever, and the first tokens, which `num_sink_tokens` keeps, are to the model
    what they always were. False is the paper: the initial FAM is seen. A saved FAM always is. Ours, not the paper's."""

    zero_first_residual: bool = True
    """Leave the initial FAM out of the first update's residual, since it holds no context. It concerns
    `fam_residual="previous"` alone."""

    fam_update: Literal["paper", "gated"] = "paper"
    """What becomes of a row: its new value Z takes its place (the paper's), or the row moves towards Z by the share a
    of its attention that fell on the block, not on the FAM: `F + a (Z - F)`. Its first update in a reading is Z itself.
    A gated row that finds nothing in a block stays as it was. The gate is ours, not the paper's."""

    fam_query: Literal["previous", "initial", "below"] = "previous"
    """Which rows query in a block: the previous FAM (the paper's), always the initial FAM, or what the layer below made
    of the rows, which then go up as tokens do; the lowest layer's are its initial FAM."""

    fam_residual: Literal["previous", "none", "initial", "below"] = "previous"
    """What is added to the rows' attention: the previous FAM (the paper's), nothing, the initial FAM, or, as in any
    layer, the rows that came up from below."""

    fam_feeds: Literal["same", "next", "slots"] = "same"
    """Where the new value goes: into the FAM of the layer that made it (the paper's); as any hidden state into that of
    the next layer with FAM, while the lowest layer's FAM stays as it began; or into slots of the layer's cache: the FAM
    is then keys and values, and `fam_value` says what their new value is."""

    fam_share: Literal["row", "head"] = "row"
    """What has its own share: a row, the mean over heads; or, with `fam_feeds="slots"`, every key/value
    head of a slot, the mean over the query heads that share it."""

    fam_share_threshold: float = 0.0
    """Share t up to which a gated row stays exactly as it was: it moves by `max(0, a - t) / (1 - t)`. Without it (0)
    every block takes a little of every row, and what a row holds fades with the number of blocks."""

    fam_value: Literal["rows", "block"] = "rows"
    """Of which keys and values a slot's new value is made: those of its row, or the block's own, as their mean weighted
    by the row's attention, for each head by its own, keys without their positions. What a slot holds is then in the
    form that the layer reads anyway, and of the same layer, the lowest one's too."""

    fam_lora: Literal["all", "rows"] = "all"
    """What LoRA acts on: tokens and FAM rows, or FAM rows alone. Tokens then go through the base model's own weights,
    and differ from the base model by what they read in the memory alone; such LoRA is never merged."""

    fam_copy: InitVar[bool | None] = None
    """Former name of two choices: False is `fam_query="initial", fam_residual="none"`, the static summary of C.3
    ("SUM FAM")."""

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
    -32 nothing (docs/explanation/choices.md)."""

    fam_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which the FAM is kept from block to block, whatever the type of the model."""

    def __post_init__(self, fam_copy: bool | None) -> None:
        self._take_fam_copy(fam_copy)
        if isinstance(self.fam_layers, list):  # as JSON and TOML have it
            object.__setattr__(self, "fam_layers", tuple(self.fam_layers))
        if self.fam_norm_bound == math.inf:  # TOML has no null
            object.__setattr__(self, "fam_norm_bound", None)
        require_types(self)
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
        is_bound = self.fam_norm_bound is None or 0 < self.fam_norm_bound <= LARGEST_BOUND
        require_field(self, "fam_norm_bound", is_bound, f"None, or above 0 and at most {LARGEST_BOUND:g}")
        require_field(self, "fam_share_threshold", 0 <= self.fam_share_threshold < 1, "at least 0 and below 1")
        require_field(
            self,
            "fam_share_threshold",
            self.fam_share_threshold == 0 or self.fam_update == "gated",
            "0 with fam_update='paper', which has no share",
        )
        if self.fam_layers is not None:
            layers = self.fam_layers
            valid = len(layers) > 0 and min(layers) >= 0 and len(set(layers)) == len(layers)
            require_field(self, "fam_layers", valid, "None or distinct layer indices, at least one")
            serves = not self.feeds_upwards or len(layers) > 1
            require_field(
                self,
                "fam_feeds",
                serves,
                "'same', or 'slots' with fam_value='block', where one layer alone carries FAM, which feeds no other",
            )
        self._require_slots()
        require_field(
            self,
            "fam_update",
            self.fam_length > 0 or self.fam_update == "paper",
            "'paper' with fam_length 0, where there is no row to update",
        )
        require_field(
            self,
            "fam_lora",
            self.fam_length > 0 or self.fam_lora == "all",
            "'all' with fam_length 0, where there is no row",
        )

    def _require_slots(self) -> None:
        """Refuse slots with choices that they do not have, and choices of slots without slots."""
        is_slots = self.fam_feeds == "slots"
        for name in ("fam_query", "fam_residual"):
            goes_up = getattr(self, name) == "below"
            require_field(self, name, goes_up == is_slots, "'below' with fam_feeds='slots', and nowhere else")
        require_field(self, "fam_share", is_slots or self.fam_share == "row", "'row' without fam_feeds='slots'")
        require_field(self, "fam_value", is_slots or self.fam_value == "rows", "'rows' without fam_feeds='slots'")
        if is_slots:
            require_field(self, "fam_init", self.fam_init == "prompt", "'prompt' with fam_feeds='slots'")
            require_field(self, "fam_position", self.fam_position != "zero", "not 'zero' with fam_feeds='slots'")
            require_field(self, "fam_norm_bound", self.fam_norm_bound is None, "None with fam_feeds='slots'")

    @property
    def has_slots(self) -> bool:
        """Whether there is a FAM, and it is keys and values, not hidden states."""
        return self.fam_length > 0 and self.fam_feeds == "slots"

    @property
    def takes_block(self) -> bool:
        """Whether slots take the means of the block's own keys and values."""
        return self.has_slots and self.fam_value == "block"

    @property
    def feeds_upwards(self) -> bool:
        """Whether a FAM is fed by the layers below it, so that the lowest one stays as it began."""
        return self.fam_length > 0 and self.fam_feeds != "same" and not self.takes_block

    def _take_fam_copy(self, fam_copy: bool | None) -> None:
        """Set query and residual by their former common name.

        Raises:
            TransformerFamError: they were given, too, and say something else.
        """
        if fam_copy is None:
            return
        if not isinstance(fam_copy, bool):
            raise TransformerFamError(f"fam_copy is {fam_copy!r}, required is True or False; change fam_copy")
        given, asked = (self.fam_query, self.fam_residual), ("previous", "previous")
        if not fam_copy:
            asked = ("initial", "none")
            if given == ("previous", "previous"):
                object.__setattr__(self, "fam_query", asked[0])
                object.__setattr__(self, "fam_residual", asked[1])
                return
        if given != asked:
            raise TransformerFamError(
                f"fam_copy={fam_copy} is fam_query={asked[0]!r} and fam_residual={asked[1]!r}, given are {given[0]!r} "
                f"and {given[1]!r}; leave fam_copy out"
            )

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
        return 2 * self.fam_length if self.fam_query == "initial" else self.fam_length

    @property
    def is_papers_update(self) -> bool:
        """Whether query, residual, update and where it goes are those of Algorithm 2."""
        choices = (self.fam_update, self.fam_query, self.fam_residual, self.fam_feeds)
        return choices == ("paper", "previous", "previous", "same")

    @property
    def needs_initial_fam(self) -> bool:
        """Whether the initial FAM takes part in every update."""
        return self.fam_length > 0 and (self.has_slots or "initial" in (self.fam_query, self.fam_residual))

    def carries_fam(self, layer_idx: int) -> bool:
        """Return whether the decoder layer `layer_idx` has a FAM."""
        return self.fam_length > 0 and (self.fam_layers is None or layer_idx in self.fam_layers)

    def replace(self, **changes: Any) -> "FamConfig":
        """Return a copy with `changes`; an unknown field is refused with the nearest known one."""
        return FamConfig.from_dict({**dataclasses.asdict(self), **changes})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "FamConfig":
        """Return the paper's configuration (`"paper"`, as `FamConfig()`) or one of ours, see `UPDATE_PRESETS`.

        Args:
            name: one of `UPDATE_PRESETS`.
            **changes: fields that differ from the preset.

        Raises:
            TransformerFamError: there is no such preset or field, or a value is out of range.
        """
        if not isinstance(name, str) or name not in UPDATE_PRESETS:
            raise TransformerFamError(f"there is no preset {name!r}; known are {', '.join(UPDATE_PRESETS)}")
        return cls.from_dict(UPDATE_PRESETS[name] | changes)

    def without_fam(self, **changes: Any) -> "FamConfig":
        """Return BSWA with the same blocks and segments, and `changes`."""
        return self.replace(**PLAIN_UPDATE | {"fam_length": 0, "fam_layers": None} | changes)

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
