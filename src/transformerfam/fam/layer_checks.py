"""Numeric checks of layers that no row of the table describes: that they do no more than their names say.

A layer may choose among many keys, slide by a window that its configuration does not name, mix tokens by a convolution,
or depend on the absolute position.
"""

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.layouts import relative_error
from transformerfam.decoder.served import decoder_layers, own_windows
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.fam.checks import PROBE_BLOCK_SIZE
from transformerfam.fam.layer_probes import PAST_LENGTH, Calls, ManyKeys, open_mask, query_sizes, run_on, seen_windows

UNFORESEEN = (TypeError, AttributeError, LookupError, ValueError, RuntimeError)
"""What unknown code may raise when it is run in another way than it was written for."""

NUM_COPIES = 1200
"""Copies of every key that attention sees: 9,600 keys, more than those are that sparse attention chooses."""

NUM_TWINS = 1024
"""Copies of one token in an input, which all go to the same expert."""

FAR = 65_536
"""Positions by which a text is moved: more than those up to which queries keep their size in models that change it."""

STARTS = (1, 13, 77, 1013, FAR)
"""Positions at which a text begins for the checks: no multiples of what layers may count by."""

FAR_TOLERANCE = 3e-2
"""Angles of RoPE are float32: at 65,536 they are wrong by 0.004. Layers that know the position differ by more."""


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


def _check_order(model: PreTrainedModel, ids: torch.Tensor) -> Calls:
    """Every layer must run once, on what the one below gave, and on nothing that comes from the ids themselves."""
    layers, num_layers = decoder_layers(model), model.config.num_hidden_layers
    if len(layers) != num_layers:
        _refuse(f"its decoder has {len(layers)} layers, and num_hidden_layers is {num_layers}")
    mask = open_mask(model, ids.shape[1], ids.shape[1])
    with Calls(model) as calls:
        hidden = run_on(model, mask, input_ids=ids)
    if calls.order != list(range(num_layers)) or len(calls.attended) != num_layers:
        _refuse(f"its layers do not run once each, one after the other: they ran as {calls.order}")
    width = model.config.hidden_size
    for layer_idx, (entered, below) in enumerate(zip(calls.entered[1:], calls.left[:-1], strict=True), 1):
        if entered.shape != (1, ids.shape[1], width) or not torch.equal(entered, below):
            _refuse(f"layer {layer_idx} is not given what the layer below gave, so the rows of its FAM would not be")
    if calls.entered[0].shape != (1, ids.shape[1], width):
        _refuse(f"hidden states have shape {tuple(calls.entered[0].shape)}, required is (1, tokens, {width})")
    again = run_on(model, mask, inputs_embeds=model.get_input_embeddings()(ids))
    if not torch.allclose(again, hidden, rtol=1e-3, atol=1e-3 * float(hidden.abs().max())):
        _refuse("given embeddings it does not give what it gives for their token ids, which it uses elsewhere, too")
    return calls


def _check_layers_apart(model: PreTrainedModel, ids: torch.Tensor, whole: Calls) -> None:
    """What a layer gives must follow from its input alone, whatever the ids and the other layers' inputs are."""
    num_layers = len(decoder_layers(model))
    mask = open_mask(model, ids.shape[1], ids.shape[1])
    for bit in range(max(1, (num_layers - 1).bit_length())):  # so that any two layers are separated once, either way
        for value in (0, 1):
            disturbed = frozenset(i for i in range(num_layers) if i >> bit & 1 == value)
            with Calls(model, whole, disturbed) as calls:
                run_on(model, mask, input_ids=ids.flip(1))
            for layer_idx in set(range(num_layers)) - disturbed:
                error = relative_error(calls.left[layer_idx], whole.left[layer_idx])
                if not error <= 1e-3:
                    _refuse(
                        f"layer {layer_idx} changes with the token ids or with another layer's input, though its own "
                        f"input stays (relative error {error:.1e}); the rows of a FAM enter a layer by its input alone"
                    )


def _check_windows(model: PreTrainedModel) -> None:
    """The masks that the decoder makes must have the windows that its configuration names."""
    for layer_idx, (found, own) in enumerate(zip(seen_windows(model), own_windows(model.config), strict=True)):
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
    before, after = (run_on(model, mask, input_ids=tokens) for tokens in (ids, changed))
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
    alone = run_on(model, open_mask(model, 1, 1), input_ids=ids[:, :1])
    twins = run_on(model, mask[None, None].to(ids.device), input_ids=ids[:, :1].expand(1, NUM_TWINS))
    error = relative_error(twins, alone.expand_as(twins))
    if not error <= _tolerance(model):
        _refuse(
            f"a token changes where it is there {NUM_TWINS} times and sees itself alone (relative error {error:.1e}): "
            "its layers share something out among the tokens of an input, as experts with a limited capacity do"
        )


def _check_keys_are_a_set(model: PreTrainedModel, ids: torch.Tensor, whole: Calls) -> None:
    """Attention must be a mean over all keys in sight, whatever their order and number."""
    num_keys = ids.shape[1] * NUM_COPIES
    with Calls(model, whole) as calls:
        run_on(model, open_mask(model, ids.shape[1], num_keys), cache=ManyKeys(NUM_COPIES), input_ids=ids)
    for layer_idx, (there, required) in enumerate(zip(calls.attended, whole.attended, strict=True)):
        error = relative_error(there, required)
        if not error <= _tolerance(model):
            _refuse(
                f"the attention of layer {layer_idx} gives something else (relative error {error:.1e}) where it sees "
                f"each of {ids.shape[1]} keys {NUM_COPIES} times, the last one first: it chooses among many keys, "
                "counts them, goes by their order, or adds a sink to them"
            )


def _check_positions_are_relative(model: PreTrainedModel, ids: torch.Tensor, whole: Calls) -> None:
    """Layers must give the same wherever a text begins, and no query may grow with its position."""
    longest = getattr(model.config, "max_position_embeddings", None)
    room = FAR if longest is None else max(0, longest - ids.shape[1])
    sizes_at_0 = query_sizes(model, ids, whole, 0)
    for start in sorted({min(start, room) for start in STARTS}):
        sizes = zip(query_sizes(model, ids, whole, start), sizes_at_0, strict=True)
        for layer_idx, (there, required) in enumerate(sizes):
            _require_relative(f"the queries' size in layer {layer_idx}", there, required, _tolerance(model), start)
        with Calls(model, whole) as calls:
            run_on(model, open_mask(model, ids.shape[1], ids.shape[1]), start=start, input_ids=ids)
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


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
