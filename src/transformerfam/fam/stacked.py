"""States put side by side in one batch, each at its own place in its block."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from transformerfam.decoder.identity import SEVERAL, ReadWith
from transformerfam.errors import StateMismatchError, TransformerFamError


def stack_states(states: Sequence[Any]) -> Any:
    """Return one new state with the sequences of all of them; see `FamState.stack`."""
    states = list(states)
    if not states:
        raise TransformerFamError("there is no state to stack, required is at least one; give a list of states")
    first = states[0]
    for number, state in enumerate(states):
        _require_alike(first, state, number)
    twin = first.shallow_copy()
    twin.read_with = _read_with(states)
    for name in ("block_fill", "num_blocks_per_row", "starts_from_saved_fam", "histories", "unread_ids"):
        setattr(twin, name, [value for state in states for value in getattr(state, name)])
    twin.layers = [_stacked_layer(layers) for layers in zip(*(state.layers for state in states), strict=True)]
    return twin


def _stacked_layer(layers: Sequence[Any]) -> Any:
    """Return a layer with the rows of all; buffers that `compact` has cut are grown to the longest."""
    joined = copy.copy(layers[0])
    longest = max(layer.keys.shape[-2] for layer in layers)
    for name in layers[0].tensors():
        parts = [getattr(layer, name) for layer in layers]
        if name in ("keys", "values"):
            parts = [nn.functional.pad(part, (0, 0, 0, longest - part.shape[-2])) for part in parts]
        setattr(joined, name, torch.cat(parts))
    return joined


def _require_alike(first: Any, other: Any, number: int) -> None:
    """Refuse a state that cannot be in one batch with the first."""
    if type(other) is not type(first):
        raise StateMismatchError(
            f"state {number} is a {type(other).__name__}, required is a {type(first).__name__}; stack states of one "
            "model"
        )
    other.require_own_rows()
    own_model = getattr(first.identity, "model", None)
    if getattr(other.identity, "model", None) is not own_model:
        raise StateMismatchError(f"state {number} is of another model than state 0; stack states of one model")
    here, there = first.layers[0].keys, other.layers[0].keys
    is_counted = first.text_start is not None
    for name, is_equal in (
        ("configuration", other.config == first.config),
        ("type", there.dtype == here.dtype),
        ("device", there.device == here.device),
        ("position_offset", not is_counted or other.position_offset == first.position_offset),
    ):
        if not is_equal:
            raise StateMismatchError(f"state {number} has another {name} than state 0; stack states that share it")


def _read_with(states: Sequence[Any]) -> ReadWith:
    """Return the weights that all sequences were read with, `SEVERAL` for a part in which they differ."""
    merged: ReadWith = {}
    for state in states:
        for part, key in state.read_with.items():
            merged[part] = key if merged.get(part, key) == key else SEVERAL
    return merged
