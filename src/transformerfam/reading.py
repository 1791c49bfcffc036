"""The methods that a converted model has beside its own: `init_state` and `read`, and its `forward`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from transformerfam.arguments import check_ids, own_mask, require_integer, saved_flags
from transformerfam.cache_argument import rename_cache
from transformerfam.cache_layer import FamLayer, LayerPlan, Sections, joined_slots
from transformerfam.errors import ReadInterrupted, StateMismatchError, TransformerFamError
from transformerfam.generation import GENERATION_METHODS
from transformerfam.half_precision import fitting
from transformerfam.identity import require_at_hand
from transformerfam.memory import initial_fam, initial_queries, memory_of, prompt_pass
from transformerfam.positions import first_position
from transformerfam.processes import uninterrupted
from transformerfam.progress import reading_bar
from transformerfam.reading_state import ReadingState
from transformerfam.row_lora import bind_lora, refuse_adapter_names
from transformerfam.state import FamState

Progress = Callable[[int, int, FamState], None]


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
    decoder, memory, weight = self.get_decoder(), memory_of(self), self.get_input_embeddings().weight
    config, num_layers = memory.config, len(memory.layouts)
    refuse_adapter_names(self)
    if config.fam_lora == "rows":
        bind_lora(self)
    assert memory.identity is not None
    for name, parameter in (("the embedding", weight), *memory.named_parameters()):
        require_at_hand(name, parameter)
    expected = (num_layers, batch_size, config.fam_length, memory.fam_width(weight.shape[1]))
    fam, saved = _saved_fam(fam, is_saved, expected)
    fam_dtype = getattr(torch, config.fam_dtype)
    needs_initial = config.needs_initial_fam or (config.fam_length and not all(saved))
    asking = initial = initial_fam(decoder) if needs_initial and not config.has_slots else None
    if needs_initial and config.has_slots:
        passed = prompt_pass(decoder)
        asking = passed.fams
        initial = [
            joined_slots(*layout.turner.turn(*slots, -first_position(config)))
            for layout, slots in zip(memory.layouts, passed.slots, strict=True)
        ]
    queries = None if initial is None else initial_queries(decoder, initial)
    queries_key = None if queries is None else memory.identity.weights_key()
    layers = []
    kinds: dict[LayerPlan, int] = {}
    lowest = next((i for i in range(num_layers) if config.carries_fam(i)), None)
    for i, (plan, layout) in enumerate(zip(memory.plans(), memory.layouts, strict=True)):
        sections = Sections.of(config, plan)
        keys, values = (
            torch.zeros(batch_size, heads, sections.num_slots, width, dtype=weight.dtype, device=weight.device)
            for heads, width in (layout.key_shape, layout.value_shape)
        )
        rows = kept = start = None
        if config.carries_fam(i):
            if initial is not None:
                start = rows = fitting(initial[i], fam_dtype).expand(batch_size, -1, -1)
            if fam is not None:
                rows = fitting(fam[i].to(weight.device), fam_dtype)
                if start is not None and not all(saved):
                    rows = torch.where(torch.tensor(saved, device=weight.device)[:, None, None], rows, start)
            assert rows is not None
            rows = rows.clone(memory_format=torch.contiguous_format)
            if asking is not None and config.needs_initial_fam and (not config.has_slots or i == lowest):
                kept = fitting(asking[i], fam_dtype).expand(batch_size, -1, -1)
                kept = kept.clone(memory_format=torch.contiguous_format)
        kind = kinds.setdefault(plan, len(kinds))
        layer = FamLayer(keys, values, rows, kept, plan, kind, sections, layout.turner, i == lowest)
        layer.mean_share = memory.mean_share
        layer.query = queries[i] if queries is not None and config.carries_fam(i) else None
        layers.append(layer)
    return FamState(
        layers,
        config,
        memory.identity,
        batch_size,
        starts_from_saved_fam=saved,
        position_offset=position_offset,
        queries_key=queries_key,
    )


@torch.no_grad()
def read(
    self: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    state: FamState | None = None,
    attention_mask: torch.Tensor | None = None,
    progress: bool | Progress = False,
) -> FamState:
    """Read tokens of any number into a state, in constant memory and without logits.

    Args:
        self: the converted model.
        input_ids: `(T,)` or `(B, T)` token ids, which follow what the state has read; `generate` leaves the last token
            that it generated unread, so begin with that one, `state.unread_ids`.
        state: reading to go on with, in place; None starts one.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, on either side; of a longer one the last T columns.
        progress: True draws a bar; a function is called with (tokens done, tokens in all, state) after every block.

    Returns:
        The state, advanced by the tokens.

    Raises:
        TransformerFamError: empty input, token ids that are no integers or out of range, a mask of another shape, or a
            batch that does not fit the state.
        ReadInterrupted: Ctrl-C; it carries the state and says how to go on.
    """
    ids = torch.as_tensor(input_ids)
    check_ids(ids, self.get_input_embeddings().weight.shape[0])
    if ids.dim() not in (1, 2):
        raise TransformerFamError(f"token ids have shape {tuple(ids.shape)}, required is (tokens,) or (batch, tokens)")
    ids = (ids[None] if ids.dim() == 1 else ids).to(self.device, torch.long)
    if attention_mask is not None:
        attention_mask = torch.as_tensor(attention_mask, device=self.device)
        attention_mask = attention_mask[None] if attention_mask.dim() == 1 else attention_mask
        attention_mask = own_mask(attention_mask, *ids.shape)
    if not (isinstance(progress, bool) or callable(progress)):
        raise TransformerFamError(f"progress is {progress!r}, required is True, False or a function")
    if state is None:
        state = self.init_state(len(ids))
    elif not isinstance(state, ReadingState):
        raise StateMismatchError(
            f"state is a {type(state).__name__}, required is one of this model; start one with model.init_state()"
        )
    if progress is True:
        with reading_bar(ids.shape[1]) as update:
            return self.read(ids, state, attention_mask, update)
    decoder, total, done = self.get_decoder(), ids.shape[1], 0
    try:
        while done < total:
            # Whole blocks for rows in step; with rows out of step any chunk is right.
            count = min(total - done, self.fam_config.block_size - state.block_fill[0])
            mask = None if attention_mask is None else attention_mask[:, done : done + count]
            with uninterrupted():  # half a piece would leave some layers in front of others
                decoder(input_ids=ids[:, done : done + count], attention_mask=mask, past_key_values=state)
                done += count
            if callable(progress):
                progress(done, total, state)
    except KeyboardInterrupt as error:
        raise ReadInterrupted(state, done) from error
    return state


def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Call the class's own `forward`; the state may come as `past_key_values` or as `cache`.

    Raises:
        TransformerFamError: both are given.
    """
    return type(self).forward(self, *args, **rename_cache(args, kwargs))


READER_METHODS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "read": read,
    **GENERATION_METHODS,
}
"""What every model with a memory has in the place of its class's methods, or beside them."""
