"""Where the sequences of a batch are when a piece begins, and the mask that follows from it.

Source: sections 2.1 and 2.2 of arXiv 2404.09173.
"""

import dataclasses
import functools

import torch

from transformerfam.config import FamConfig
from transformerfam.fam.layer import LayerPlan, Sections
from transformerfam.fam.state import FamState


@dataclasses.dataclass(frozen=True)
class Phase:
    """Where the rows of a batch are when a piece begins: one entry per sequence, or one for all of them.

    `fills` are tokens already in the block, `counts` tokens that the piece adds, `blocks` whole blocks that were read,
    counted up to where more of them change nothing; `started_empty` says whose initial FAM is never seen.
    """

    fills: tuple[int, ...]
    counts: tuple[int, ...]
    blocks: tuple[int, ...]
    started_empty: tuple[bool, ...]

    @classmethod
    def of(cls, state: FamState, counts: list[int]) -> "Phase":
        """Read the phase off a state."""
        blocks = (min(n, state.num_blocks_until_steady) for n in state.num_blocks_per_row)
        started_empty = [state.config.fam_starts_empty and not saved for saved in state.starts_from_saved_fam]
        entries = list(zip(state.block_fill, counts, blocks, started_empty, strict=True))
        if len(set(entries)) == 1:
            entries = entries[:1]
        return cls(*(tuple(column) for column in zip(*entries, strict=True)))

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences are at the same place, so that slices serve instead of gathers."""
        return len(self.fills) == 1

    def num_memory_tokens(self, config: FamConfig, plan: LayerPlan) -> list[int]:
        """Return the valid tokens in a layer's memory segments."""
        return [min(n * config.block_size, plan.num_memory_tokens) for n in self.blocks]

    def has_sinks(self, config: FamConfig, plan: LayerPlan) -> list[bool]:
        """Return whether the sink tokens have left a layer's memory segments."""
        return [plan.num_sink_tokens > 0 and n * config.block_size > plan.num_memory_tokens for n in self.blocks]

    @property
    def is_empty(self) -> list[bool]:
        """Return whether the FAM is one that nobody sees."""
        return [n == 0 and empty for n, empty in zip(self.blocks, self.started_empty, strict=True)]

    def num_older_fams(self, config: FamConfig) -> list[int]:
        """Return the older FAMs that are seen."""
        written = [max(0, n - empty) for n, empty in zip(self.blocks, self.started_empty, strict=True)]
        return [min(n, config.num_previous_fams - 1) for n in written]

    def window_of_slots(self, config: FamConfig, plan: LayerPlan, sections: Sections) -> slice:
        """Return the slots that hold every key in sight of some sequence."""
        stop = sections.block + max(fill + count for fill, count in zip(self.fills, self.counts, strict=True))
        num_memory_tokens = max(self.num_memory_tokens(config, plan))
        if any(self.has_sinks(config, plan)):
            start = 0
        elif num_memory_tokens:
            start = sections.older_fams - num_memory_tokens
        elif plan.has_fam:
            start = sections.fam - max(self.num_older_fams(config)) * config.fam_length
        else:
            start = sections.block
        return slice(start, stop)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def piece_mask(
    config: FamConfig, plan: LayerPlan, num_rows: int, phase: Phase, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return what every row of a piece sees of the slots in sight, as a bias on its logits; see `buffer_mask`."""
    seen = phase.window_of_slots(config, plan, Sections.of(config, plan))
    return buffer_mask(config, plan, num_rows, phase, dtype)[..., seen].contiguous().to(device)


def buffer_mask(config: FamConfig, plan: LayerPlan, num_rows: int, phase: Phase, dtype: torch.dtype) -> torch.Tensor:
    """Return what every row of a piece sees of a layer's whole buffer, as a bias on its logits.

    Args:
        config: the configuration; `fam_key_bias` is the bias on FAM keys for tokens.
        plan: what the layer keeps and sees.
        num_rows: FAM rows in front of the tokens.
        phase: where the sequences are.
        dtype: floating type of the logits.

    Returns:
        `(1 or B, 1, num_rows + T, slots)`: 0 where seen, the smallest number where not.

    Source: sections 2.1 and 2.2; table 8 for `window`.
    """
    sections = Sections.of(config, plan)
    slot = torch.arange(sections.num_slots)[None, None]  # (1, 1, slots)
    fills, counts, memory, older = (
        torch.tensor(column)[:, None, None]
        for column in (
            phase.fills,
            phase.counts,
            phase.num_memory_tokens(config, plan),
            phase.num_older_fams(config),
        )
    )
    is_sink = slot < sections.memory
    is_memory = (slot >= sections.memory) & (slot < sections.older_fams)
    is_fam = (slot >= sections.older_fams) & (slot < sections.block)
    is_block = slot >= sections.block
    in_block = slot - sections.block
    place_in_block = torch.arange(max(phase.counts))[None, :, None] + fills  # (B, T, 1)

    distance = torch.where(is_block, place_in_block - in_block, place_in_block + sections.older_fams - slot)
    seen = is_sink & torch.tensor(phase.has_sinks(config, plan))[:, None, None]
    seen = seen | (is_memory & (slot >= sections.older_fams - memory))
    seen = seen | (is_block & (distance >= 0))
    if plan.window is not None:
        seen = seen & (is_sink | (distance < plan.window))
    is_fam = is_fam & ~torch.tensor(phase.is_empty)[:, None, None]
    seen = seen | (is_fam & (slot >= sections.fam - older * config.fam_length))

    shut = torch.finfo(dtype).min
    mask = torch.full(seen.shape, shut, dtype=dtype)
    mask[seen] = 0
    mask[seen & is_fam] = config.fam_key_bias
    if num_rows:
        rows_see = (is_block & (in_block < fills + counts)) | (is_fam & (slot >= sections.fam))
        rows = torch.full(rows_see.shape, shut, dtype=dtype).masked_fill(rows_see, 0)
        rows = rows.expand(len(phase.fills), num_rows, -1)
        mask = torch.cat((rows, mask), dim=1)
    return mask[:, None]
