"""How a reading with FAM begins: all of its state, allocated at once."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.arguments import require_integer, saved_flags
from transformerfam.decoder.half_precision import fitting
from transformerfam.decoder.layouts import with_tables_of
from transformerfam.decoder.memory import memory_of
from transformerfam.decoder.parameters import require_at_hand
from transformerfam.decoder.peft_calls import refuse_adapters_by_place
from transformerfam.decoder.positions import first_position
from transformerfam.decoder.structure import require_layers
from transformerfam.errors import StateMismatchError
from transformerfam.fam.initial import initial_fam, initial_queries, prompt_pass
from transformerfam.fam.layer import FamLayer, LayerPlan, Sections, joined_slots
from transformerfam.fam.row_lora import bind_lora
from transformerfam.fam.state import FamState


def _saved_fam(
    fam: torch.Tensor | None, is_saved: Sequence[bool] | None, expected: tuple[int, ...]
) -> tuple[torch.Tensor | None, list[bool]]:
    """Return the saved FAM of every sequence, of the shape `expected`, and which sequences start from it.

    Raises:
        TransformerFamError: arguments of `init_state` have another shape or length, or do not fit each other.
    """
    batch_size = expected[1]
    flags = saved_flags(is_saved, batch_size, fam is not None)
    if fam is not None:
        if not isinstance(fam, torch.Tensor) or not fam.is_floating_point():
            what = fam.dtype if isinstance(fam, torch.Tensor) else type(fam).__name__
            raise StateMismatchError(f"fam is a {what}, required is a tensor of floating numbers, as state.fams gives")
        if not bool(torch.isfinite(fam).all()):
            raise StateMismatchError("fam has numbers that are not finite; save it from a state of a reading")
        fam = fam[:, None].expand(-1, batch_size, -1, -1) if fam.dim() == 3 else fam
        if tuple(fam.shape) != expected:
            raise StateMismatchError(
                f"fam has shape {tuple(fam.shape)}, required is (layers, batch, fam_length, width) {expected}; "
                "save it from a state of the same model and configuration"
            )
    return fam, flags


def init_state(
    self: PreTrainedModel,
    batch_size: int = 1,
    fam: torch.Tensor | None = None,
    position_offset: int = 0,
    is_saved: Sequence[bool] | None = None,
) -> FamState:
    """Start a reading: allocate all of its state.

    Args:
        self: the converted model.
        batch_size: number of sequences.
        fam: `(L, F, D)` or `(L, batch_size, F, D)` saved FAM to start from instead of the initial one; its residual
            counts from the first update on (B.2.3).
        position_offset: position of the first token; felt by `fam_position="zero"` alone (B.2.2).
        is_saved: per sequence, whether it starts from `fam`; the others start from the initial FAM. None: all do.

    Returns:
        A state of `batch_size` sequences that have read nothing.

    Raises:
        TransformerFamError: `batch_size` or `position_offset` is no integer in range, `fam` has another shape,
            `is_saved` does not fit them, or the embeddings or the initial FAM are offloaded.
    """
    batch_size = require_integer("batch_size", batch_size, least=1)
    position_offset = require_integer("position_offset", position_offset, least=0)
    decoder, weight = self.get_decoder(), self.get_input_embeddings().weight
    memory: Any = memory_of(self)
    require_layers(self, len(memory.layouts))
    memory.layouts = with_tables_of(decoder, memory.layouts)
    config, num_layers = memory.config, len(memory.layouts)
    refuse_adapters_by_place(self)
    if config.fam_lora == "rows":
        bind_lora(self)
    assert memory.identity is not None
    for name, parameter in (("the embedding", weight), *memory.named_parameters()):
        require_at_hand(name, parameter)
    expected = (num_layers, batch_size, config.fam_length, memory.fam_width(weight.shape[1]))
    fam, saved = _saved_fam(fam, is_saved, expected)
    needs_initial = config.needs_initial_fam or (config.fam_length and not all(saved))
    asking, initial = _initial_fams(decoder, memory) if needs_initial else (None, None)
    queries = None if initial is None else initial_queries(decoder, initial)
    layers = []
    kinds: dict[LayerPlan, int] = {}
    lowest = next((i for i in range(num_layers) if config.carries_fam(i)), None)
    for i, (plan, layout) in enumerate(zip(memory.plans(), memory.layouts, strict=True)):
        sections = Sections.of(config, plan)
        keys, values = (
            torch.zeros(batch_size, heads, sections.num_slots, width, dtype=weight.dtype, device=weight.device)
            for heads, width in (layout.key_shape, layout.value_shape)
        )
        rows = kept = query = None
        if config.carries_fam(i):
            start = None if initial is None else _fitting(initial[i], config, batch_size)
            rows = _first_rows(start, None if fam is None else fam[i].to(weight.device), saved, config)
            if asking is not None and config.needs_initial_fam and (not config.has_slots or i == lowest):
                kept = _fitting(asking[i], config, batch_size).clone(memory_format=torch.contiguous_format)
            query = None if queries is None else queries[i]
        kind = kinds.setdefault(plan, len(kinds))
        layer = FamLayer(keys, values, rows, kept, plan, kind, sections, layout.turner, i == lowest)
        layer.mean_share, layer.query = memory.mean_share, query
        layers.append(layer)
    return FamState(
        layers,
        config,
        memory.identity,
        batch_size,
        starts_from_saved_fam=saved,
        position_offset=position_offset,
        queries_key=None if queries is None else memory.identity.weights_key(),
    )


def _initial_fams(decoder: Any, memory: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every layer's first queries, and the FAM that a reading starts from: with slots keys and values."""
    if not memory.config.has_slots:
        initial = initial_fam(decoder)
        return initial, initial
    passed = prompt_pass(decoder)
    slots = [
        joined_slots(*layout.turner.turn(*slots, -first_position(memory.config)))
        for layout, slots in zip(memory.layouts, passed.slots, strict=True)
    ]
    return passed.fams, slots


def _fitting(rows_FD: torch.Tensor, config: FamConfig, batch_size: int) -> torch.Tensor:
    """Return rows in the type of the FAM, for every sequence."""
    return fitting(rows_FD, getattr(torch, config.fam_dtype)).expand(batch_size, -1, -1)


def _first_rows(
    start_BFD: torch.Tensor | None, saved_BFD: torch.Tensor | None, is_saved: list[bool], config: FamConfig
) -> torch.Tensor:
    """Return the FAM of one layer in front of a reading: the saved one of sequences that start from it."""
    rows = start_BFD
    if saved_BFD is not None:
        rows = fitting(saved_BFD, getattr(torch, config.fam_dtype))
        if start_BFD is not None and not all(is_saved):
            rows = torch.where(torch.tensor(is_saved, device=rows.device)[:, None, None], rows, start_BFD)
    assert rows is not None
    return rows.clone(memory_format=torch.contiguous_format)
