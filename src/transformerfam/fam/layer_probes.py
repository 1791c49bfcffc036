"""What the layers of an unconverted model take, give and see, noted while it runs: what `layer_checks` compares."""

import contextvars
import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from transformerfam.decoder.cache_argument import as_cache
from transformerfam.decoder.served import decoder_layers, family_of, part_of

PAST_LENGTH = 100_003
"""Tokens before the one whose mask is examined: more than windows are, and no multiple of a chunk's length."""

SIZING_BACK_END = "fam_sizes"
_SIZES: contextvars.ContextVar[list[torch.Tensor]] = contextvars.ContextVar("norms of queries")


class Calls:
    """Note, of one forward, what enters and leaves every layer and what its attention gives.

    Args:
        model: not converted.
        first: a forward whose layers' inputs are given to the layers of this one.
        disturbed: layers whose tokens are also given those of the other end of the text.
    """

    def __init__(
        self, model: PreTrainedModel, first: "Calls | None" = None, disturbed: frozenset[int] = frozenset()
    ) -> None:
        self._layers, self._attention, self._first = decoder_layers(model), family_of(model).attention, first
        self._disturbed = disturbed
        self.order: list[int] = []
        self.entered: list[torch.Tensor] = []
        self.left: list[torch.Tensor] = []
        self.attended: list[torch.Tensor] = []

    def __enter__(self) -> "Calls":
        self._handles = []
        for layer_idx, layer in enumerate(self._layers):
            enter = functools.partial(self._enter, layer_idx)
            self._handles += [
                layer.register_forward_pre_hook(enter),
                layer.register_forward_hook(functools.partial(self._note, self.left)),
                part_of(layer, self._attention).register_forward_hook(functools.partial(self._note, self.attended)),
            ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, layer_idx: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.order.append(layer_idx)
        self.entered.append(args[0].clone())
        if self._first is None:
            return args
        given = self._first.entered[layer_idx]
        return (given + given.flip(1) if layer_idx in self._disturbed else given, *args[1:])

    @staticmethod
    def _note(to: list[torch.Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        to.append((output[0] if isinstance(output, tuple) else output).clone())


class ManyKeys(Cache):
    """Show attention every key many times, the last one first; its weights' sums stay as they are."""

    def __init__(self, num_copies: int) -> None:
        super().__init__(layers=[])
        self.num_copies = num_copies

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the copies."""
        key, value = (kept.flip(2).repeat_interleave(self.num_copies, 2) for kept in (key_states, value_states))
        return key, value

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0: nothing was read before."""
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given."""
        return 0


class _LongPast(Cache):
    """Say that many tokens were read, and hold none of them."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the number of tokens."""
        return PAST_LENGTH

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens."""
        return PAST_LENGTH

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the keys that a mask is over, from the first one on."""
        return PAST_LENGTH + query_length, 0


def run_on(
    model: PreTrainedModel, mask: torch.Tensor, start: int = 0, cache: Any = None, **inputs: Any
) -> torch.Tensor:
    """Run the decoder, whose text begins at position `start`, and return its last hidden states."""
    decoder, num_tokens = model.get_decoder(), mask.shape[2]
    positions = torch.arange(start, start + num_tokens, device=mask.device)[None]
    extra = {"use_cache": False} if cache is None else as_cache(cache)
    output = decoder(attention_mask=mask, position_ids=positions, **inputs, **extra)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def open_mask(model: PreTrainedModel, num_tokens: int, num_keys: int) -> torch.Tensor:
    """Return a mask in which every token sees every key."""
    return torch.zeros(1, 1, num_tokens, num_keys, dtype=model.dtype, device=model.device)


def seen_windows(model: PreTrainedModel) -> list[int]:
    """Return, for every layer, how many of the last tokens are visible in the masks that the decoder makes.

    `PAST_LENGTH + 1` means all of them; -1 means that the visible tokens are not the last ones.
    """
    decoder, layers = model.get_decoder(), decoder_layers(model)
    seen: list[int] = []

    def note(tuple_out: bool, hidden: torch.Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = attention_mask
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            seen.append(PAST_LENGTH + 1)  # no mask: all
        else:
            visible = (mask if mask.dtype == torch.bool else mask == 0)[0, 0, -1].nonzero()[:, 0]
            is_last = len(visible) > 0 and int(visible[0]) == mask.shape[-1] - len(visible)
            seen.append(len(visible) if is_last else -1)
        return (hidden,) if tuple_out else hidden

    is_tuple: list[bool] = []
    handles = [
        layer.register_forward_hook(lambda _m, _a, output: is_tuple.append(isinstance(output, tuple)))
        for layer in layers
    ]
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    run_on(model, open_mask(model, 1, 1), input_ids=first)
    for handle in handles:
        handle.remove()
    back_end = model.config._attn_implementation
    model.set_attn_implementation("eager")  # whose masks are dense
    forwards = [vars(layer).get("forward") for layer in layers]  # as accelerate sets them
    for layer, gives_tuple in zip(layers, is_tuple, strict=True):
        layer.forward = functools.partial(note, gives_tuple)
    try:
        decoder(input_ids=first, **as_cache(_LongPast()))
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
        model.set_attn_implementation(back_end)
    return seen


def query_sizes(model: PreTrainedModel, ids: torch.Tensor, whole: Calls, start: int) -> list[torch.Tensor]:
    """Return the norms of every layer's queries as attention takes them, scaled, `(B, H, T)` each."""
    sizes: list[torch.Tensor] = []
    token, back_end = _SIZES.set(sizes), model.config._attn_implementation
    try:
        model.set_attn_implementation(SIZING_BACK_END)
        with Calls(model, whole):
            run_on(model, open_mask(model, ids.shape[1], ids.shape[1]), start=start, input_ids=ids)
    finally:
        model.set_attn_implementation(back_end)
        _SIZES.reset(token)
    return sizes


def _note_sizes(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Note the queries' norms, and give every token its own value: the result is not used."""
    _SIZES.get().append(query.norm(dim=-1) * (query.shape[-1] ** -0.5 if scaling is None else scaling))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(SIZING_BACK_END, _note_sizes)
AttentionMaskInterface.register(SIZING_BACK_END, sdpa_mask)
