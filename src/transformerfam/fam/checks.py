"""Check on the model at hand, with numbers, that the four seams do what the algorithm says."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.decoder.cache_argument import cache_in
from transformerfam.decoder.layouts import RELATIVE_TOLERANCE, relative_error
from transformerfam.decoder.memory import probing_with
from transformerfam.decoder.served import decoder_layers, family_of, part_of
from transformerfam.decoder.slot import memory_in
from transformerfam.errors import UnsupportedModelError
from transformerfam.fam.memory import memory_of
from transformerfam.versions import does_not_fit

PROBE_BLOCK_SIZE = 4
PROBE_FAM_LENGTH = 2
PROBE_WINDOW = 3


def check_update(model: Any, config: FamConfig) -> None:
    """Refuse layers that are not there, and an update that the model cannot do."""
    if config.fam_update == "gated" and model.config._attn_implementation == "flex_attention":
        raise UnsupportedModelError(
            "fam_update is 'gated', and attention back end 'flex_attention' gives no weights, by which rows move; call "
            "model.set_attn_implementation('sdpa') first"
        )
    check_layers(config, len(decoder_layers(model)))


def check_layers(config: FamConfig, num_layers: int) -> None:
    """Refuse a memory in layers that a model does not have.

    Raises:
        UnsupportedModelError: `fam_layers` names such a layer, or there is no next layer to feed.
    """
    if config.feeds_upwards and num_layers == 1:
        raise UnsupportedModelError(
            f"fam_feeds is {config.fam_feeds!r}, and a model of one layer has no next one to feed; required is "
            "fam_feeds='same', or 'slots' with fam_value='block'"
        )
    if config.fam_layers is not None and max(config.fam_layers) >= num_layers:
        raise UnsupportedModelError(
            f"fam_layers names layer {max(config.fam_layers)}, the model has layers 0 to {num_layers - 1}; name those"
        )


def probing(model: PreTrainedModel, **changes: Any) -> contextlib.AbstractContextManager[None]:
    """Put a small configuration in force for a probe, without dropout."""
    probe = {
        "block_size": PROBE_BLOCK_SIZE,
        "fam_length": PROBE_FAM_LENGTH,
        "num_memory_segments": 1,
        "fam_key_bias": 0.0,
        "fam_layers": memory_of(model).config.fam_layers,
    }
    return probing_with(model, FamConfig(**probe | changes))


@contextlib.contextmanager
def _short_windows(decoder: Any) -> Iterator[None]:
    """Let every layer that slides see so few tokens that a probe feels it."""
    memory, window = memory_in(decoder), getattr(decoder.config, "sliding_window", None)
    layouts = memory.layouts
    if not any(layout.window for layout in layouts):
        yield
        return
    sliding: list[Any] = [module for module in decoder.modules() if getattr(module, "sliding_window", None)]
    own = [module.sliding_window for module in sliding]  # which flash attention is handed
    decoder.config.sliding_window = PROBE_WINDOW
    for module in sliding:
        module.sliding_window = PROBE_WINDOW
    memory.layouts = [
        dataclasses.replace(layout, window=None if layout.window is None else PROBE_WINDOW) for layout in layouts
    ]
    try:
        yield
    finally:
        decoder.config.sliding_window = window
        for module, value in zip(sliding, own, strict=True):
            module.sliding_window = value
        memory.layouts = layouts


class Watch:
    """Note what enters every layer and what its attention gives, for tokens without FAM rows.

    A second run can be given what entered the layers in a first one. Rounding, and with it the choice of experts, is
    then not carried on from layer to layer, where it grows.

    Args:
        model: the converted model.
        first: the first run; None: this is the first.
        num_given: its tokens that enter the layers here, too; None: all.

    Attributes:
        entered: of every layer, what would have entered it, piece by piece.
        inputs: of every layer, what has entered it.
        outputs: of every layer, what its attention gave.
    """

    def __init__(self, model: PreTrainedModel, first: "Watch | None" = None, num_given: int | None = None) -> None:
        layers, self._attention = decoder_layers(model), family_of(model).attention
        self._layers, self._first, self._num_given = layers, first, num_given
        self.entered: list[list[torch.Tensor]] = [[] for _ in layers]
        self.inputs: list[list[torch.Tensor]] = [[] for _ in layers]
        self.outputs: list[list[torch.Tensor]] = [[] for _ in layers]

    def __enter__(self) -> "Watch":
        self._handles = []
        for layer_idx, layer in enumerate(self._layers):
            enter, leave = (functools.partial(step, layer_idx) for step in (self._enter, self._leave))
            self._handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            attention = part_of(layer, self._attention)
            self._handles.append(attention.register_forward_hook(leave, with_kwargs=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(
        self, layer_idx: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        hidden, num_rows = args[0], self._num_rows(kwargs)
        tokens = hidden[:, num_rows:].clone()
        start = sum(part.shape[1] for part in self.inputs[layer_idx])
        self.entered[layer_idx].append(tokens)
        if self._first is not None:
            given = torch.cat(self._first.inputs[layer_idx], dim=1)[:, start : self._num_given]
            given = given[:, : tokens.shape[1]]
            tokens = torch.cat((given, tokens[:, given.shape[1] :]), dim=1)
        self.inputs[layer_idx].append(tokens)
        return (torch.cat((hidden[:, :num_rows], tokens), dim=1), *args[1:]), kwargs

    def _leave(self, layer_idx: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        self.outputs[layer_idx].append(output[:, self._num_rows(kwargs) :].clone())

    @staticmethod
    def _num_rows(kwargs: dict[str, Any]) -> int:
        step = getattr(cache_in(kwargs), "step", None)
        return 0 if step is None else step.num_rows

    def require_equal(self, seam: str, num_tokens: int | None = None) -> None:
        """Refuse a model whose attentions give something else than in the first run, up to `num_tokens` tokens."""
        assert self._first is not None
        pairs = [(self.entered[0], self._first.entered[0]), *zip(self.outputs, self._first.outputs, strict=True)]
        for there, required in pairs:
            require_equal(seam, torch.cat(there, dim=1)[:, :num_tokens], torch.cat(required, dim=1)[:, :num_tokens])


@torch.no_grad()
def check_seams(model: PreTrainedModel, every_layer: bool = False) -> None:
    """Run a few tokens through the converted model and compare with what the algorithm says.

    Args:
        model: converted.
        every_layer: look for the residual in every layer with FAM, not in the lowest one alone.

    Raises:
        UnsupportedModelError: names the seam that fails, and by how much.

    Source: DESIGN, "How FAM enters a model".
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, 2 * PROBE_BLOCK_SIZE), generator=generator).to(model.device)
    _check_cache_and_mask(model, ids)
    if memory_of(model).config.fam_length:
        _check_rows(model, ids)
        _check_first_residual(model, ids, every_layer)


def require_equal(seam: str, there: torch.Tensor, required: torch.Tensor) -> None:
    """Refuse a model where a seam gives something else than is required, beyond the rounding of its type.

    Raises:
        UnsupportedModelError: names the seam, and by how much it differs.
    """
    error, dtype = relative_error(there, required), required.dtype
    limit = RELATIVE_TOLERANCE[dtype]
    if error <= limit:
        return  # NaN is refused
    reason = f"the {seam} seam does not fit this model: relative error {error:.1e}, allowed is {limit:.0e}"
    if dtype in (torch.float32, torch.float64):
        raise does_not_fit(reason)
    raise UnsupportedModelError(
        f"{reason} in {dtype}; convert it in float32 (model.float()) to distinguish rounding from a wrong seam"
    )


def _require_changed(seam: str, there: torch.Tensor, before: torch.Tensor) -> None:
    if torch.equal(there, before):
        raise does_not_fit(f"the {seam} seam does not fit this model: what must reach it has no effect")


def _check_cache_and_mask(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Without FAM, attention on pieces of two blocks that all see each other must give what the base model's gives."""
    decoder = model.get_decoder()
    with probing(model, fam_length=0, fam_layers=None), _short_windows(decoder):
        with Watch(model) as base:
            type(decoder).forward(decoder, input_ids=ids, use_cache=False)
        state = model.init_state(1)
        with Watch(model, base) as pieces:
            for part in ids.split((3, 5), dim=1):
                decoder(input_ids=part, past_key_values=state)
    try:
        pieces.require_equal("cache")
    except UnsupportedModelError as error:
        window = getattr(decoder.config, "sliding_window", None)
        if window is None:
            raise
        raise UnsupportedModelError(
            f"{error}. The configuration has sliding_window={window}, by which keys are masked here; where the class "
            "has no sliding window, set it to None and convert again"
        ) from error


def _check_rows(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """The FAM must reach the tokens, the block must reach the FAM, and no token may see a later one."""
    decoder = model.get_decoder()
    shape = (len(memory_of(model).layouts), PROBE_FAM_LENGTH, model.config.hidden_size)
    saved = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.get_input_embeddings().weight.shape[0]
    with probing(model):
        first, results = Watch(model), []
        num_same = ids.shape[1] - 1
        later = Watch(model, first, num_same)
        for tokens, fam, watch in (
            (ids, saved, first),
            (ids, -saved, contextlib.nullcontext()),
            (changed, saved, later),
        ):
            state = model.init_state(1, fam=fam)
            with watch:
                results.append((decoder(input_ids=tokens, past_key_values=state).last_hidden_state, state.fams))
    (hidden, fams), (hidden_other_fam, _), (_, fams_changed) = results
    _require_changed("row", hidden_other_fam[:, 0], hidden[:, 0])
    _require_changed("row", fams_changed, fams)
    later.require_equal("mask", num_same)


def _check_first_residual(model: PreTrainedModel, ids: torch.Tensor, every_layer: bool) -> None:
    """In the first update, the sum after attention must be the attention branch alone.

    Where the feed-forward layer is added to the same residual, the layer's output must be the two branches alone. In
    the update of a saved FAM the branches must be the same, and the residual be there once.
    """
    fam = _any_fam(model)
    chosen = [i for i in range(len(fam)) if memory_of(model).config.carries_fam(i)]
    chosen = chosen if every_layer else chosen[:1]
    first, saved = (_branches(model, ids, fam, chosen, is_saved=is_saved) for is_saved in (False, True))
    for layer_idx, (branches, first_sum), (branches_of_saved, sum_of_saved) in zip(chosen, first, saved, strict=True):
        require_equal("row", branches, branches_of_saved)
        require_equal("first residual", first_sum, branches)
        require_equal("first residual", sum_of_saved, branches_of_saved + fam[layer_idx].to(branches))


def _branches(
    model: PreTrainedModel, ids: torch.Tensor, fam_LFD: torch.Tensor, chosen: list[int], *, is_saved: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what layers add to the residual of FAM rows in an update, and the sums that result."""
    decoder, family, config = model.get_decoder(), family_of(model), model.config
    layers = [decoder_layers(model)[layer_idx] for layer_idx in chosen]
    seen: list[dict[str, torch.Tensor]] = [{} for _ in layers]

    def note_output(of: dict[str, torch.Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        of[name] = output[:, :PROBE_FAM_LENGTH].clone()  # some layers add to it in place

    def note_input(of: dict[str, torch.Tensor], module: nn.Module, args: Any) -> None:
        of["sum"] = args[0][:, :PROBE_FAM_LENGTH].clone()

    handles = []
    for layer, of in zip(layers, seen, strict=True):
        last = part_of(layer, family.branch)
        if family.branch == family.attention:  # its own hook has changed what it puts out: listen to what is in it
            last = part_of(last, family.output_projection)
        note = functools.partial(note_output, of)
        handles.append(last.register_forward_hook(functools.partial(note, "attention"), prepend=True))
        if family.is_parallel(config):
            handles += [
                part_of(layer, "mlp").register_forward_hook(functools.partial(note, "feed-forward")),
                layer.register_forward_hook(functools.partial(note, "sum")),
            ]
        else:
            behind = part_of(layer, family.behind)
            handles.append(behind.register_forward_pre_hook(functools.partial(note_input, of)))
    try:
        with probing(model, fam_init=memory_of(model).config.fam_init):
            state = model.init_state(1, fam=fam_LFD)
            state.starts_from_saved_fam = [is_saved]
            decoder(input_ids=ids[:, :PROBE_BLOCK_SIZE], past_key_values=state)
    finally:
        for handle in handles:
            handle.remove()
    factor = family.branch_factor(config)
    return [(factor * of["attention"] + of.get("feed-forward", 0), of["sum"]) for of in seen]


def _any_fam(model: PreTrainedModel) -> torch.Tensor:
    shape = (len(memory_of(model).layouts), PROBE_FAM_LENGTH, model.config.hidden_size)
    some = model.get_input_embeddings().weight[:1000].detach().float()
    scale = float(some.abs().median())  # single dimensions may be massive
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(2))
