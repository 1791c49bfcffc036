"""One layer's part of a `FamState`: its keys, values and FAM.

Every layer keeps one buffer of keys and one of values, `(B, G, slots, K)`, whose slots are

    [sink tokens | memory segments, oldest first | older FAMs, oldest first | FAM | this block]

and the FAM itself, `(B, F, D)`. The sections never change size. Memory segments fill up from the right, this block
from the left. (Families with latent attention keep a latent as "key" and a rotary key as "value".)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from transformerfam.config import FamConfig
from transformerfam.decoder.half_precision import MEAN_SHARE
from transformerfam.decoder.positions import Turner


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What one kind of layer keeps and sees besides its block.

    Attributes:
        has_fam: whether it carries FAM.
        num_sink_tokens: first tokens of the text that stay.
        num_memory_tokens: last tokens in front of the block that stay.
        window: last tokens that a token sees of these and of its block, itself included; None is all of them.
    """

    has_fam: bool
    num_sink_tokens: int
    num_memory_tokens: int
    window: int | None

    @classmethod
    def for_layers(cls, config: FamConfig, own_windows: Sequence[int | None]) -> list["LayerPlan"]:
        """Return every layer's plan.

        Args:
            config: the configuration.
            own_windows: every layer's own sliding window. In a hybrid model, where some layers have one, those without
                FAM keep it as it is: their tokens see it whole, across blocks, and nothing else.
        """
        is_hybrid = None in own_windows and any(own_windows)
        plans = []
        for layer_idx, own in enumerate(own_windows):
            has_fam = config.carries_fam(layer_idx)
            if is_hybrid and own is not None and not has_fam:
                plans.append(cls(False, 0, own - 1, own))
                continue
            num_memory_tokens = config.num_memory_segments * config.block_size
            longest = num_memory_tokens + config.block_size
            windows = [window for window in (config.window, own) if window is not None and window < longest]
            plans.append(cls(has_fam, config.num_sink_tokens, num_memory_tokens, min(windows, default=None)))
        return plans

    def num_blocks_until_steady(self, config: FamConfig) -> int:
        """Return the blocks after which every block sees as much as any other, and none has a first update."""
        num_blocks = -(-self.num_memory_tokens // config.block_size)
        return max(num_blocks + 1, config.num_previous_fams)


class Sections(NamedTuple):
    """Slots of a layer's key/value buffer: the first slot of every section, and the number of slots."""

    memory: int
    older_fams: int
    fam: int
    block: int
    num_slots: int

    @classmethod
    def of(cls, config: FamConfig, plan: LayerPlan) -> "Sections":
        """Lay out the buffer of a layer."""
        older = plan.num_sink_tokens + plan.num_memory_tokens
        fam = older + (config.num_fam_slots - config.fam_length if plan.has_fam else 0)
        block = fam + (config.fam_length if plan.has_fam else 0)
        return cls(plan.num_sink_tokens, older, fam, block, block + config.block_size)


def joined_slots(key_BGFK: torch.Tensor, value_BGFK: torch.Tensor) -> torch.Tensor:
    """Return keys and values of F slots as the rows `(B, F, W)` of a FAM: all heads' keys, then all heads' values."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (key_BGFK, value_BGFK)], dim=-1)


def place(buffer: torch.Tensor, start: int, content: torch.Tensor) -> torch.Tensor:
    """Put `content` at slot `start` of dimension -2: in place, or out of place while gradients are recorded."""
    stop = start + content.shape[-2]
    if torch.is_grad_enabled():
        if stop - start == buffer.shape[-2]:
            return content.to(buffer.dtype)
        return torch.slice_scatter(buffer, content.to(buffer.dtype), -2, start, stop)
    buffer[..., start:stop, :] = content
    return buffer


class FamLayer(CacheLayerMixin):
    """One layer's part of the state.

    Args:
        keys: `(B, G, slots, K)`, zeros.
        values: `(B, G, slots, K)`, zeros.
        fam: `(B, F, D)`, or None on a layer without FAM.
        initial_fam: `(B, F, D)` initial FAM, kept where it takes part in every update.
        plan: what the layer keeps and sees.
        kind: number of the plan among those of the state's layers.
        sections: the layout of keys and values.
        turner: turns both.
        is_lowest: whether no layer below carries FAM.

    Attributes:
        mean_share: how large a row may be in the model's type, see `half_precision`.
    """

    mean_share = MEAN_SHARE
    is_compileable = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        fam: torch.Tensor | None,
        initial_fam: torch.Tensor | None,
        plan: LayerPlan,
        kind: int,
        sections: Sections,
        turner: Turner,
        is_lowest: bool = False,
    ) -> None:
        super().__init__()
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.plan = plan
        self.kind = kind
        self.sections = sections
        self.turner = turner
        self.fam = fam
        self.initial_fam = initial_fam
        self.is_lowest = is_lowest
        self.query: torch.Tensor | None = None  # `(1, H, F, K)` of the initial FAM, a constant of the weights
        self.new_value: torch.Tensor | None = None  # of the FAM, where it is not the layer's output; likewise
        self.share: torch.Tensor | None = None  # `(B, F)` or `(B, F, G)`, of their attention on the block; likewise
        self.next_fam: torch.Tensor | None = None  # written by a piece, kept when the whole piece is through
        self.fam_before_bound: torch.Tensor | None = None  # the last update, noted while gradients are recorded
        self.is_initialized = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what the layer carries, by name."""
        named = {"keys": self.keys, "values": self.values, "fam": self.fam, "initial_fam": self.initial_fam}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every carried tensor by `function(tensor)`."""
        for name, tensor in self.tensors().items():
            setattr(self, name, function(tensor))

    def put(self, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write keys and values `(B, G, n, K)` at slot `start`."""
        self.keys = place(self.keys, start, key)
        self.values = place(self.values, start, value)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the FAM as the keys and values `(B, G, F, K)` that it is with `fam_feeds="slots"`.

        They are where the FAM is after a block, as if the next block's first token were at position 0.
        """
        assert self.fam is not None
        widths = [tensor.shape[1] * tensor.shape[3] for tensor in (self.keys, self.values)]
        key, value = (
            part.unflatten(-1, (tensor.shape[1], -1)).transpose(1, 2)
            for part, tensor in zip(self.fam.split(widths, dim=-1), (self.keys, self.values), strict=True)
        )
        return key, value

    def by_head(self, share_BFG: torch.Tensor) -> torch.Tensor:
        """Return the share of every number of the FAM, `(B, F, W)`, with a share for every head of the slots."""
        parts = [share_BFG.repeat_interleave(tensor.shape[3], dim=-1) for tensor in (self.keys, self.values)]
        return torch.cat(parts, dim=-1)

    def drop_block(self, num_tokens: int = 0) -> None:
        """Free the keys and values of a complete block: what is seen of it later has been copied from there.

        Args:
            num_tokens: first tokens of the block that stay.
        """
        kept = self.sections.block + num_tokens
        self.keys, self.values = self.keys[..., :kept, :].clone(), self.values[..., :kept, :].clone()

    def make_room(self) -> None:
        """Give the block that begins its slots back, where `drop_block` took them."""
        missing = self.sections.num_slots - self.keys.shape[-2]
        if missing:
            self.keys, self.values = (nn.functional.pad(t, (0, 0, 0, missing)) for t in (self.keys, self.values))

    def forget_piece(self) -> None:
        """Drop what an interrupted piece has left."""
        self.next_fam = self.new_value = self.share = None

    def keep_fam(self) -> None:
        """Make the FAM that the piece wrote the layer's FAM."""
        if self.next_fam is not None and self.fam is not None:
            if torch.is_grad_enabled():
                self.fam = self.next_fam
            else:
                self.fam.copy_(self.next_fam)
        self.next_fam = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: `init_state` allocates everything."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: a layer is written by its state, which knows the piece."""
        raise AssertionError("FamLayer is updated through FamState.update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of slots; the piece brings its own mask."""
        return self.sections.num_slots, 0

    def get_seq_length(self) -> int:
        """Return 0; see `FamState.get_seq_length`."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: any length can be read."""
        return -1
