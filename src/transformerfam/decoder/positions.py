"""Positions: where a block and its FAM are, and how keys are turned from one place to another.

Every sequence's current block is at the same few positions, from `first_position` on; when a block is complete, the
kept keys are turned back by `block_size` instead (rotations compose), so that positions never grow.

Source: B.2.1 of arXiv 2404.09173.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from transformerfam.config import FamConfig

Distance = float | range | tuple[float, ...]
"""Positions by which all tokens are turned, or each by its own."""


def first_position(config: FamConfig) -> int:
    """Return the position of a block's first token, large enough that nothing in its sight is before 0."""
    return max(config.num_memory_slots, (config.num_previous_fams - 1) * config.block_size + config.fam_length)


def warn_beyond_trained(model_config: Any, num_positions: int) -> None:
    """Warn of positions after those that a model was trained on, where RoPE's angles are new to it."""
    trained = getattr(model_config, "max_position_embeddings", None)
    if trained is not None and num_positions > trained:
        warnings.warn(
            f"a block reaches position {num_positions - 1:,}, and the model was trained on positions up to "
            f"{trained - 1:,} (max_position_embeddings), so it will read worse; choose a smaller block_size, or fewer "
            "num_memory_segments",
            stacklevel=3,
        )
    rope = getattr(model_config, "rope_parameters", None) or {}
    scaled_from = rope.get("original_max_position_embeddings") if rope.get("llama_4_scaling_beta") else None
    if scaled_from is not None and num_positions > scaled_from:
        warnings.warn(
            f"a block reaches position {num_positions - 1:,}, and from {scaled_from:,} on the model scales its queries "
            "by the position (llama_4_scaling_beta), though a position in a block is not a place in the text; choose a "
            "smaller block_size, or fewer num_memory_segments",
            stacklevel=3,
        )


def warn_text_beyond_trained(model_config: Any, num_positions: int, why: str) -> None:
    """Warn of a text that has come to positions after those that a model was trained on.

    Args:
        model_config: of the model.
        num_positions: from the beginning of the text on.
        why: they are counted from there.
    """
    trained = getattr(model_config, "max_position_embeddings", None)
    if trained is not None and num_positions > trained:
        warnings.warn(
            f"the text has come to position {num_positions - 1:,}, and the model was trained on positions up to "
            f"{trained - 1:,} (max_position_embeddings), so it will read worse: {why}",
            stacklevel=3,
        )


def row_offsets(config: FamConfig) -> tuple[float, ...]:
    """Return the positions of a FAM's rows, measured from the first token after the block that wrote it.

    Position `zero` does not depend on the block and is not served here.
    """
    length = config.fam_length
    if config.fam_position == "fractional":
        return tuple(row / (length + 1) - 1 for row in range(1, length + 1))
    return tuple(float(row) for row in range(-length, 0))


def fam_offsets(config: FamConfig) -> torch.Tensor:
    """Return `row_offsets` as a tensor, `(F,)`."""
    return torch.tensor(row_offsets(config), dtype=torch.float64)


def query_shift(config: FamConfig) -> int:
    """Return the distance from where a FAM was written to its query, in positions."""
    moves = config.fam_query_position == "current" and config.fam_position != "zero"
    return config.block_size if moves else 0


class Turner:
    """Turn what a layer keeps by a number of positions, after RoPE was applied to it.

    Args:
        inverse_frequencies: `(R / 2,)` angles per position of the layer's RoPE; R head dimensions carry a position.
            None: none does.
        is_interleaved: whether neighbouring dimensions turn together, not the first half with the second.
        is_at_end: whether the last R dimensions turn, not the first.
        is_in_values: whether the position is in the second tensor of the cache (latent attention), not in the first.
        place: which of the rotary embedding's tables it is, and the sign; None where it is none of them.
    """

    def __init__(
        self,
        inverse_frequencies: torch.Tensor | None,
        is_interleaved: bool = False,
        is_at_end: bool = False,
        is_in_values: bool = False,
        place: tuple[int, int] | None = None,
    ) -> None:
        self.inverse_frequencies = (
            None if inverse_frequencies is None else inverse_frequencies.detach().to("cpu", torch.float64)
        )
        self.is_interleaved = is_interleaved
        self.is_at_end = is_at_end
        self.is_in_values = is_in_values
        self.place = place
        self._tables: dict[tuple[Distance, torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def with_tables(self, tables: Sequence[torch.Tensor]) -> "Turner":
        """Return a turner by the tables that a model has now, which `model.to(dtype)` rounds; itself where none is."""
        if self.place is None or self.inverse_frequencies is None:
            return self
        index, sign = self.place
        table = sign * tables[index].detach().to("cpu", torch.float64)
        if torch.equal(table, self.inverse_frequencies):
            return self
        return Turner(table, self.is_interleaved, self.is_at_end, self.is_in_values, self.place)

    @torch.inference_mode(mode=False)
    def _table(self, distance: Distance, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        name = (distance, like.dtype, like.device)
        if name not in self._tables:
            assert self.inverse_frequencies is not None
            if isinstance(distance, range | tuple):
                angles = torch.tensor(distance, dtype=torch.float64)[:, None] * self.inverse_frequencies
            else:
                angles = distance * self.inverse_frequencies
            table = (angles.cos().to(like), angles.sin().to(like))
            if isinstance(distance, range):  # of which there are many
                return table
            self._tables[name] = table
        return self._tables[name]

    def turn(
        self, key_BGTK: torch.Tensor, value_BGTK: torch.Tensor, distance: Distance
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values as they would be `distance` positions further on; what carries none comes as it is.

        A range or a tuple has one distance for every token; of a tuple the table is kept, for the next block.

        Source: RoPE; R(p + d) = R(d) R(p).
        """
        if distance == 0 or self.inverse_frequencies is None or key_BGTK.shape[-2] == 0:
            return key_BGTK, value_BGTK
        if self.is_in_values:
            return key_BGTK, self._turned(value_BGTK, distance)
        return self._turned(key_BGTK, distance), value_BGTK

    def _turned(self, rows_BGTK: torch.Tensor, distance: Distance) -> torch.Tensor:
        cos, sin = self._table(distance, rows_BGTK)
        num_rotary, rest = 2 * cos.shape[-1], rows_BGTK.shape[-1] - 2 * cos.shape[-1]
        if self.is_at_end:
            still, rotary = rows_BGTK.split((rest, num_rotary), dim=-1)
        else:
            rotary, still = rows_BGTK.split((num_rotary, rest), dim=-1)
        first, second = (rotary[..., ::2], rotary[..., 1::2]) if self.is_interleaved else rotary.chunk(2, dim=-1)
        turned = (first * cos).addcmul(second, sin, value=-1), (second * cos).addcmul(first, sin)
        parts = [torch.stack(turned, dim=-1).flatten(-2)] if self.is_interleaved else list(turned)
        if rest:
            parts.insert(0 if self.is_at_end else len(parts), still)
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
