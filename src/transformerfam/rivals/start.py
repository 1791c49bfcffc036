"""A reading with a rival begins: `init_state`, the method of a model that has one."""

from typing import Any

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.arguments import require_integer, saved_flags
from transformerfam.decoder.memory import memory_of
from transformerfam.decoder.structure import require_layers
from transformerfam.errors import StateMismatchError
from transformerfam.rivals.lanes import Lane
from transformerfam.rivals.state import RivalState


def init_state(
    self: PreTrainedModel,
    batch_size: int = 1,
    carried: torch.Tensor | None = None,
    position_offset: int = 0,
    is_saved: Any = None,
) -> RivalState:
    """Start a reading with a rival.

    Args:
        self: the model.
        batch_size: number of sequences.
        carried: memory to start from, `(1, batch_size, 1, N)`, as `state.carried` gives it; None: the rival's own.
        position_offset: without effect, since positions begin at 0 in every segment.
        is_saved: per sequence, whether it starts from `carried`; the others start as the rival does. None: all do.

    Returns:
        A state of `batch_size` sequences that have read nothing.

    Raises:
        TransformerFamError: a number is no integer in range, or `carried` or `is_saved` has another shape.
    """
    batch_size = require_integer("batch_size", batch_size, least=1)
    require_integer("position_offset", position_offset, least=0)
    rival: Any = memory_of(self)
    require_layers(self, len(rival.layouts))
    saved = saved_flags(is_saved, batch_size, carried is not None)
    lanes = []
    for is_from_saved in (False, True):
        rows = [row for row, flag in enumerate(saved) if flag == is_from_saved]
        if not rows:
            continue
        lane = Lane(rows, rival.initial_memory(len(rows)))
        if is_from_saved:
            assert carried is not None
            lane.memory = _unflattened(lane.memory, carried, batch_size, rows)
            lane.num_remembered = rival.config.num_memory_segments
        lanes.append(lane)
    return RivalState(lanes, rival.config, rival.identity, rival.has_memory)


def _unflattened(
    like: dict[str, torch.Tensor], carried_1B1N: torch.Tensor, batch_size: int, rows: list[int]
) -> dict[str, torch.Tensor]:
    """Return rows of `state.carried` as named tensors of the shapes of `like`."""
    sizes = [like[name][0].numel() for name in sorted(like)]
    if tuple(carried_1B1N.shape) != (1, batch_size, 1, sum(sizes)):
        raise StateMismatchError(
            f"the memory to start from has shape {tuple(carried_1B1N.shape)}, required is (1, batch, 1, numbers) "
            f"{(1, batch_size, 1, sum(sizes))}; save it from a state of the same model and configuration"
        )
    parts = carried_1B1N[0, rows, 0].split(sizes, dim=1)
    return {name: part.view_as(like[name]) for name, part in zip(sorted(like), parts, strict=True)}
