"""States as files hold them: the slots that are filled, and nothing of those that are not.

Keys and values of a file are `(slots of all sequences, G, K)`: the filled slots of the first sequence in the order of
the buffer, then those of the next. Files of version 1 hold whole buffers, `(B, G, slots, K)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from transformerfam.config import FAM_DTYPES, FamConfig
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.fam.layer import FamLayer

SLOTS = ("keys", "values")
FORMER_NAMES = {"initial_fam": "query_fam"}
"""What files that were written before call a layer's tensors."""


def filled_slots(config: FamConfig, layer: FamLayer, fill: int, num_blocks: int) -> list[slice]:
    """Return the slots of one sequence that a later token may see, in the order of the buffer.

    At a block's end the keys of the FAM are not among them: the next block begins by making them of the FAM.

    Args:
        config: of the memory.
        layer: the layer.
        fill: tokens in the sequence's block.
        num_blocks: whole blocks that it has read.
    """
    plan, sections = layer.plan, layer.sections
    num_memory_tokens = min(num_blocks * config.block_size, plan.num_memory_tokens)
    num_older = min(num_blocks, config.num_previous_fams - 1) * config.fam_length if plan.has_fam else 0
    slots = [
        slice(0, plan.num_sink_tokens if num_blocks else 0),  # which the first block's end has put there
        slice(sections.older_fams - num_memory_tokens, sections.older_fams),
        slice(sections.fam - num_older, sections.fam),
        slice(sections.fam if fill else sections.block, sections.block + fill),
    ]
    return [section for section in slots if section.stop > section.start]


def filled_indices(config: FamConfig, layer: FamLayer, places: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """Return the sequences and the slots of all that is filled, two index tensors of one length.

    Args:
        config: of the memory.
        layer: the layer.
        places: of every sequence the tokens in its block and the whole blocks that it has read.
    """
    rows: list[int] = []
    slots: list[int] = []
    for row, (fill, num_blocks) in enumerate(places):
        for section in filled_slots(config, layer, fill, num_blocks):
            slots += range(section.start, section.stop)
        rows += [row] * (len(slots) - len(rows))
    return torch.tensor(rows, dtype=torch.long), torch.tensor(slots, dtype=torch.long)


def packed_tensors(state: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return what a file holds of a state, by name; sections without a slot are left out.

    Args:
        state: a `FamState`.
        dtype: type of keys, values and FAMs in the file; None leaves them as they are.
    """
    places = list(zip(state.block_fill, state.num_blocks_per_row, strict=True))
    tensors = {}
    for i, layer in enumerate(state.layers):
        rows, slots = filled_indices(state.config, layer, places)
        for name, tensor in layer.tensors().items():
            if name in SLOTS:
                tensor = tensor[rows.to(tensor.device), :, slots.to(tensor.device)]
            if tensor.numel():
                exact = dtype is None or name == "initial_fam"  # a constant of the weights, which is never rounded
                tensors[f"layers.{i}.{name}"] = tensor if exact else tensor.to(dtype)
    return tensors


def num_packed_bytes(state: Any) -> int:
    """Return the bytes of `packed_tensors`, without making them."""
    places = list(zip(state.block_fill, state.num_blocks_per_row, strict=True))
    total = 0
    for layer in state.layers:
        num_slots = len(filled_indices(state.config, layer, places)[0])
        for name, tensor in layer.tensors().items():
            count = num_slots * tensor.shape[1] * tensor.shape[3] if name in SLOTS else tensor.numel()
            total += count * tensor.element_size()
    return total


def unpack_tensors(
    state: Any, tensors: Mapping[str, torch.Tensor], places: Sequence[tuple[int, int]], path: Any, dtype: str | None
) -> None:
    """Fill a new state with what a file holds.

    Args:
        state: a `FamState` as `init_state` makes it.
        tensors: what `packed_tensors` gave, or whole buffers.
        places: of every sequence the tokens in its block and the whole blocks that it has read.
        path: of the file, for messages.
        dtype: the type that the file was rounded to; None: it has the state's own.

    Raises:
        StateMismatchError: a tensor has another shape or type than the state's.
        CorruptFileError: there is a tensor of no layer.
    """
    rest = dict(tensors)
    for i, layer in enumerate(state.layers):
        rows, slots = filled_indices(state.config, layer, places)
        for name, tensor in layer.tensors().items():
            stored = rest.pop(f"layers.{i}.{FORMER_NAMES.get(name, name)}", None)
            stored = rest.pop(f"layers.{i}.{name}", stored)
            is_packed = name in SLOTS and not (stored is not None and stored.dim() == 4)
            shape = (len(rows), tensor.shape[1], tensor.shape[3]) if is_packed else tuple(tensor.shape)
            required = tensor.dtype if dtype is None or name == "initial_fam" else getattr(torch, dtype)
            if stored is None and is_packed and not len(rows):
                continue
            if stored is None or tuple(stored.shape) != shape or stored.dtype != required:
                there = "nothing" if stored is None else f"{stored.dtype} {tuple(stored.shape)}"
                raise StateMismatchError(
                    f"{path} has {there} as {name} of layer {i}, required is {required} {shape}; load it into a model "
                    "of the dtype that it was made on"
                )
            if is_packed:
                tensor[rows.to(tensor.device), :, slots.to(tensor.device)] = stored.to(tensor.device, tensor.dtype)
            else:
                tensor.copy_(stored)
    if rest:
        raise CorruptFileError(f"{path} holds {min(rest)}, which is of no layer here; make the state again")


def stored_dtype(name: str | None) -> torch.dtype | None:
    """Return the type that keys, values and FAMs have in a file; None: their own.

    Raises:
        TransformerFamError: there is no such type.
    """
    if name is None:
        return None
    if name not in FAM_DTYPES:
        raise TransformerFamError(f"dtype is {name!r}, required is one of {', '.join(FAM_DTYPES)} or None; choose one")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
