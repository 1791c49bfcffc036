"""Positions: where a block and its FAM stand, and how keys are turned from one place to another.

Every sequence's current block stands at the same few positions, from `first_position` on; when a block is complete, the
kept keys are turned back by `block_size` instead (rotations compose), so that positions never grow.

Source: B.2.1 of arXiv 2404.09173.
"""

import torch

from transformerfam.config import FamConfig


def first_position(config: FamConfig) -> int:
    """Return the position of a block's first token, large enough that nothing in sight of it stands before 0."""
    return max(config.num_memory_slots, (config.num_previous_fams - 1) * config.block_size + config.fam_length)


def fam_offsets(config: FamConfig) -> torch.Tensor:
    """Return where a FAM stands, `(F,)`, measured from the first token after the block that wrote it.

    Position `zero` does not depend on the block and is not served here.
    """
    length = config.fam_length
    if config.fam_position == "fractional":
        return torch.arange(1, length + 1, dtype=torch.float64) / (length + 1) - 1
    return torch.arange(-length, 0, dtype=torch.float64)


def query_shift(config: FamConfig) -> int:
    """Return the positions from where a FAM was written to where its query stands."""
    moves = config.fam_query_position == "current" and config.fam_position != "zero"
    return config.block_size if moves else 0


class KeyTurner:
    """Turn keys by a number of positions, after RoPE was applied to them.

    Args:
        inverse_frequencies: `(K_rotary / 2,)` angles per position of the model's RoPE, in the half-split layout; head
            dimensions beyond `K_rotary` carry no position.
    """

    def __init__(self, inverse_frequencies: torch.Tensor) -> None:
        self.inverse_frequencies = inverse_frequencies.detach().to("cpu", torch.float64)
        self._tables: dict[tuple[float, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode(mode=False)
    def _table(self, distance: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        name = (distance, like.dtype, like.device)
        if name not in self._tables:
            angles = distance * self.inverse_frequencies
            self._tables[name] = (angles.cos().to(like), angles.sin().to(like))
        return self._tables[name]

    def turn(self, key_BGTK: torch.Tensor, distance: float) -> torch.Tensor:
        """Return the keys as they would be `distance` positions further on.

        Source: RoPE; R(p + d) = R(d) R(p).
        """
        if distance == 0 or key_BGTK.shape[-2] == 0:
            return key_BGTK
        cos, sin = self._table(distance, key_BGTK)
        rotary, rest = key_BGTK.split((2 * len(cos), key_BGTK.shape[-1] - 2 * len(cos)), dim=-1)
        first, second = rotary.chunk(2, dim=-1)
        turned = (first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)
        return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)
