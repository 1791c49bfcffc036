"""Numeric checks of layers that no row of the table describes: that they do no more than their names say.

A layer may choose among many keys, slide by a window that its configuration does not name, mix tokens by a convolution,
or depend on the absolute position.
"""

import contextvars
import functools
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from transformerfam.decoder.cache_argument import as_cache
from transformerfam.decoder.layouts import relative_error
from transformerfam.decoder.served import decoder_layers, family_of, own_windows, part_of
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.fam.checks import PROBE_BLOCK_SIZE

UNFORESEEN = (TypeError, AttributeError, LookupError, ValueError, RuntimeError)
"""What code that is not known may raise where it is run in another way than its own."""

NUM_COPIES = 1200
"""Copies of every key that attention sees: 9,600 keys, more than those are that sparse attention chooses."""

NUM_TWINS = 1024
"""Copies of one token in an input, which all go to the same expert."""

PAST_LENGTH = 100_003
"""Tokens in front of the one whose mask is looked at: more than windows are, and no multiple of a chunk's length."""

FAR = 65_536
"""Positions by which a text is moved: more than those up to which queries keep their size in models that change it."""

STARTS = (1, 13, 77, 1013, FAR)
"""Positions at which a text begins for the checks: no multiples of what layers may count by."""

FAR_TOLERANCE = 3e-2
"""Angles of RoPE are float32: at 65,536 they are wrong by 0.004. Layers that know the position differ by more."""

SIZING_BACK_END = "fam_sizes"
_SIZES: contextvars.ContextVar[list[torch.Tensor]] = contextvars.ContextVar("norms of queries")


class _Calls:
    """Note, of one forward, what enters and leaves every layer and what its attention gives.

    Args:
        model: not converted.
        first: a forward whose layers' inputs are given to the layers of this one.
        disturbed: layers whose tokens are also given those of the other end of the text.
    """

    def __init__(
        self, model: PreTrainedModel, first: "_Calls | None" = None, disturbed: frozenset[int] = frozenset()
    ) -> None:
        self._layers, self._attention, self._first = decoder_layers(model), family_of(model).attention, first
        self._disturbed = disturbed
        self.order: list[int] = []
        self.entered: list[torch.Tensor] = []
        self.left: list[torch.Tensor] = []
        self.attended: list[torch.Tensor] = []

    def __enter__(self) -> "_Calls":
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


class _ManyKeys(Cache):
    """Show attention every key many times, the last one first; its weights' sums stay as they are."""

    def __init__(self, num_copies: int) -> None:
        super().__init__(layers=[])
        self.num_copies = num_copies

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
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


@torch.no_grad()
def check_layers(model: PreTrainedModel) -> None:
    """Refuse layers that do more than the seams know, before conversion.

    Raises:
        UnsupportedModelError: names what they do.
    """
    was_training = model.training
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, 2 * PROBE_BLOCK_SIZE), generator=generator).to(model.device)
    model.eval()
    try:
        whole = _check_order(model, ids)
        _check_layers_apart(model, ids, whole)
        _check_windows(model)
        _check_tokens_apart(model, ids)
        _check_keys_are_a_set(model, ids, whole)
        _check_positions_are_relative(model, ids, whole)
        _check_tokens_are_uncounted(model, ids)
    except UNFORESEEN as error:
        if isinstance(error, TransformerFamError):
            raise
        raise UnsupportedModelError(f"{type(model).__name__} does not run as the checks run it ({error})") from error
    finally:
        model.train(was_training)


def _refuse(what: str) -> None:
    raise UnsupportedModelError(what)


def _run(model: PreTrainedModel, mask: torch.Tensor, start: int = 0, cache: Any = None, **inputs: Any) -> torch.Tensor:
    """Return the decoder's last hidden states."""
    decoder, num_tokens = model.get_decoder(), mask.shape[2]
    positions = torch.arange(start, start + num_tokens, device=mask.device)[None]
    extra = {"use_cache": False} if cache is None else as_cache(cache)
    output = decoder(attention_mask=mask, position_ids=positions, **inputs, **extra)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _open_mask(model: PreTrainedModel, num_tokens: int, num_keys: int) -> torch.Tensor:
    return torch.zeros(1, 1, num_tokens, num_keys, dtype=model.dtype, device=model.device)


def _check_order(model: PreTrainedModel, ids: torch.Tensor) -> _Calls:
    """Every layer must run once, on what the one below gave, and on nothing that comes from the ids themselves."""
    layers, num_layers = decoder_layers(model), model.config.num_hidden_layers
    if len(layers) != num_layers:
        _refuse(f"its decoder has {len(layers)} layers, and num_hidden_layers is {num_layers}")
    mask = _open_mask(model, ids.shape[1], ids.shape[1])
    with _Calls(model) as calls:
        hidden = _run(model, mask, input_ids=ids)
    if calls.order != list(range(num_layers)) or len(calls.attended) != num_layers:
        _refuse(f"its layers do not run once each, one after the other: they ran as {calls.order}")
    width = model.config.hidden_size
    for layer_idx, (entered, below) in enumerate(zip(calls.entered[1:], calls.left[:-1], strict=True), 1):
        if entered.shape != (1, ids.shape[1], width) or not torch.equal(entered, below):
            _refuse(f"layer {layer_idx} is not given what the layer below gave, so the rows of its FAM would not be")
    if calls.entered[0].shape != (1, ids.shape[1], width):
        _refuse(f"hidden states have shape {tuple(calls.entered[0].shape)}, required is (1, tokens, {width})")
    again = _run(model, mask, inputs_embeds=model.get_input_embeddings()(ids))
    if not torch.allclose(again, hidden, rtol=1e-3, atol=1e-3 * float(hidden.abs().max())):
        _refuse("given embeddings it does not give what it gives for their token ids, which it uses elsewhere, too")
    return calls


def _check_layers_apart(model: PreTrainedModel, ids: torch.Tensor, whole: _Calls) -> None:
    """What a layer gives must follow from its input alone, whatever the ids and the other layers' inputs are."""
    num_layers = len(decoder_layers(model))
    mask = _open_mask(model, ids.shape[1], ids.shape[1])
    for bit in range(max(1, (num_layers - 1).bit_length())):  # so that any two layers are parted once, either way
        for value in (0, 1):
            disturbed = frozenset(i for i in range(num_layers) if i >> bit & 1 == value)
            with _Calls(model, whole, disturbed) as calls:
                _run(model, mask, input_ids=ids.flip(1))
            for layer_idx in set(range(num_layers)) - disturbed:
                error = relative_error(calls.left[layer_idx], whole.left[layer_idx])
                if not error <= 1e-3:
                    _refuse(
                        f"layer {layer_idx} changes with the token ids or with another layer's input, though its own "
                        f"input stays (relative error {error:.1e}); the rows of a FAM enter a layer by its input alone"
                    )


def _check_windows(model: PreTrainedModel) -> None:
    """The masks that the decoder makes must have the windows that its configuration names."""
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
    _run(model, _open_mask(model, 1, 1), input_ids=first)
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
    for layer_idx, (found, own) in enumerate(zip(seen, own_windows(model.config), strict=True)):
        if found != (PAST_LENGTH + 1 if own is None else own):
            does = f"sees the last {found} tokens" if 0 <= found <= PAST_LENGTH else "sees all tokens"
            does = "sees tokens that are not the last ones" if found < 0 else does
            _refuse(f"layer {layer_idx} {does}, and its configuration says {'all' if own is None else own}")


def _check_tokens_apart(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Where a mask lets every token see itself alone, no token may change with another one."""
    num_tokens = ids.shape[1]
    mask = torch.full((num_tokens, num_tokens), torch.finfo(model.dtype).min, dtype=model.dtype).fill_diagonal_(0)
    changed, middle = ids.clone(), num_tokens // 2
    changed[:, middle] = (ids[:, middle] + 1) % model.get_input_embeddings().weight.shape[0]
    mask = mask[None, None].to(ids.device)
    before, after = (_run(model, mask, input_ids=tokens) for tokens in (ids, changed))
    others = [token for token in range(num_tokens) if token != middle]
    error = relative_error(after[:, others], before[:, others])
    if not error <= 1e-3:
        _refuse(
            f"tokens change with others that attention's mask hides from them (relative error {error:.1e}): its layers "
            "mix tokens by something else than attention, as a convolution or a recurrence, or take no mask"
        )


def _check_tokens_are_uncounted(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """A token that is there many times, each of which sees itself alone, must be what it is alone."""
    mask = torch.full((NUM_TWINS, NUM_TWINS), torch.finfo(model.dtype).min, dtype=model.dtype).fill_diagonal_(0)
    alone = _run(model, _open_mask(model, 1, 1), input_ids=ids[:, :1])
    twins = _run(model, mask[None, None].to(ids.device), input_ids=ids[:, :1].expand(1, NUM_TWINS))
    error = relative_error(twins, alone.expand_as(twins))
    if not error <= _tolerance(model):
        _refuse(
            f"a token changes where it is there {NUM_TWINS} times and sees itself alone (relative error {error:.1e}): "
            "its layers share something out among the tokens of an input, as experts with a limited capacity do"
        )


def _check_keys_are_a_set(model: PreTrainedModel, ids: torch.Tensor, whole: _Calls) -> None:
    """Attention must be a mean over all keys in sight, whatever their order and number."""
    num_keys = ids.shape[1] * NUM_COPIES
    with _Calls(model, whole) as calls:
        _run(model, _open_mask(model, ids.shape[1], num_keys), cache=_ManyKeys(NUM_COPIES), input_ids=ids)
    for layer_idx, (there, required) in enumerate(zip(calls.attended, whole.attended, strict=True)):
        error = relative_error(there, required)
        if not error <= _tolerance(model):
            _refuse(
                f"the attention of layer {layer_idx} gives something else (relative error {error:.1e}) where it sees "
                f"each of {ids.shape[1]} keys {NUM_COPIES} times, the last one first: it chooses among many keys, "
                "counts them, goes by their order, or has a sink beside them"
            )


def _check_positions_are_relative(model: PreTrainedModel, ids: torch.Tensor, whole: _Calls) -> None:
    """Layers must give the same wherever a text begins, and no query may grow with its position."""
    longest = getattr(model.config, "max_position_embeddings", None)
    room = FAR if longest is None else max(0, longest - ids.shape[1])
    sizes_at_0 = _query_sizes(model, ids, whole, 0)
    for start in sorted({min(start, room) for start in STARTS}):
        sizes = zip(_query_sizes(model, ids, whole, start), sizes_at_0, strict=True)
        for layer_idx, (there, required) in enumerate(sizes):
            _require_relative(f"the queries' size in layer {layer_idx}", there, required, _tolerance(model), start)
        with _Calls(model, whole) as calls:
            _run(model, _open_mask(model, ids.shape[1], ids.shape[1]), start=start, input_ids=ids)
        tolerance = max(FAR_TOLERANCE * start / FAR, _tolerance(model))
        for part, found, expected in (
            ("the attention of layer", calls.attended, whole.attended),
            ("layer", calls.left, whole.left),
        ):
            for layer_idx, (there, required) in enumerate(zip(found, expected, strict=True)):
                _require_relative(f"{part} {layer_idx}", there, required, tolerance, start)


def _require_relative(what: str, there: torch.Tensor, required: torch.Tensor, tolerance: float, start: int) -> None:
    error = relative_error(there, required)
    if not error <= tolerance:
        _refuse(
            f"{what} changes with the absolute position (relative error {error:.1e} where a text begins at position "
            f"{start}), and positions of a text with FAM stay small"
        )


def _query_sizes(model: PreTrainedModel, ids: torch.Tensor, whole: _Calls, start: int) -> list[torch.Tensor]:
    """Return the norms of every layer's queries, scaled, `(B, H, T)` each, as attention is handed them."""
    sizes: list[torch.Tensor] = []
    token, back_end = _SIZES.set(sizes), model.config._attn_implementation
    try:
        model.set_attn_implementation(SIZING_BACK_END)
        with _Calls(model, whole):
            _run(model, _open_mask(model, ids.shape[1], ids.shape[1]), start=start, input_ids=ids)
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
    """Note the queries' norms, and give every token its own value: what comes of it is not looked at."""
    _SIZES.get().append(query.norm(dim=-1) * (query.shape[-1] ** -0.5 if scaling is None else scaling))
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


AttentionInterface.register(SIZING_BACK_END, _note_sizes)
AttentionMaskInterface.register(SIZING_BACK_END, sdpa_mask)


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
