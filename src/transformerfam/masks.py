"""Where the sequences of a batch stand when a piece begins, and the mask that follows from it.

Source: sections 2.1 and 2.2 of arXiv 2404.09173.
"""

import dataclasses
import functools

import torch

from transformerfam.cache_layer import Sections
from transformerfam.config import FamConfig
from transformerfam.state import FamState


@dataclasses.dataclass(frozen=True)
class Phase:
    """Where the rows of a batch stand when a piece begins: one entry per sequence, or one for all of them.

    `fills` are tokens already in the block, `counts` tokens that the piece adds, `memory` valid memory segments,
    `older` valid older FAMs, `sinks` whether the sink tokens have left the memory segments.
    """

    fills: tuple[int, ...]
    counts: tuple[int, ...]
    memory: tuple[int, ...]
    older: tuple[int, ...]
    sinks: tuple[bool, ...]

    @classmethod
    def of(cls, state: FamState, counts: list[int]) -> "Phase":
        """Read the phase off a state."""
        config, blocks = state.config, state.num_blocks_per_row
        entries = list(
            zip(
                state.block_fill,
                counts,
                (min(n, config.num_memory_segments) for n in blocks),
                (min(n, config.num_previous_fams - 1) for n in blocks),
                (config.num_sink_tokens > 0 and n > config.num_memory_segments for n in blocks),
                strict=True,
            )
        )
        if len(set(entries)) == 1:
            entries = entries[:1]
        return cls(*(tuple(column) for column in zip(*entries, strict=True)))

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences stand at the same place, so that slices serve instead of gathers."""
        return len(self.fills) == 1

    def window_of_slots(self, config: FamConfig, sections: Sections) -> slice:
        """Return the slots that hold every key in sight; all of them when the sequences differ."""
        if not self.is_uniform:
            return slice(0, sections.num_slots)
        stop = sections.block + self.fills[0] + self.counts[0]
        if self.sinks[0]:
            start = 0
        elif self.memory[0]:
            start = sections.older_fams - self.memory[0] * config.block_size
        else:
            start = (
                sections.fam - self.older[0] * config.fam_length if sections.fam < sections.block else sections.block
            )
        return slice(start, stop)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def piece_mask(
    config: FamConfig, has_fam: bool, num_rows: int, phase: Phase, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return what every row of a piece sees of the slots in sight, as a bias on its logits; see `buffer_mask`."""
    seen = phase.window_of_slots(config, Sections.of(config, has_fam))
    return buffer_mask(config, has_fam, num_rows, phase, dtype)[..., seen].contiguous().to(device)


def buffer_mask(config: FamConfig, has_fam: bool, num_rows: int, phase: Phase, dtype: torch.dtype) -> torch.Tensor:
    """Return what every row of a piece sees of a layer's whole buffer, as a bias on its logits.

    Args:
        config: the configuration; `fam_key_bias` is the bias on FAM keys for tokens.
        has_fam: whether the layer has a FAM.
        num_rows: FAM rows in front of the tokens.
        phase: where the sequences stand.
        dtype: floating type of the logits.

    Returns:
        `(1 or B, 1, num_rows + T, slots)`: 0 where seen, the smallest number where not.

    Source: sections 2.1 and 2.2; table 8 for `window`.
    """
    sections = Sections.of(config, has_fam)
    size = config.block_size
    slot = torch.arange(sections.num_slots)[None, None]  # (1, 1, slots)
    fills, counts, memory, older = (
        torch.tensor(column)[:, None, None] for column in (phase.fills, phase.counts, phase.memory, phase.older)
    )
    is_sink = slot < sections.memory
    is_memory = (slot >= sections.memory) & (slot < sections.older_fams)
    is_fam = (slot >= sections.older_fams) & (slot < sections.block)
    is_block = slot >= sections.block
    in_block = slot - sections.block
    place_in_block = torch.arange(max(phase.counts))[None, :, None] + fills  # (B, T, 1)

    distance = torch.where(is_block, place_in_block - in_block, place_in_block + sections.older_fams - slot)
    seen = is_sink & torch.tensor(phase.sinks)[:, None, None]
    seen = seen | (is_memory & (slot >= sections.older_fams - memory * size))
    seen = seen | (is_block & (distance >= 0))
    if config.window is not None:
        seen = seen & (is_sink | (distance < config.window))
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
