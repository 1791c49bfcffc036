"""Give a transformers decoder a rival's memory, in place: the counterpart of `convert`."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from transformerfam.config import FamConfig
from transformerfam.decoder.arguments import require_integer, saved_flags
from transformerfam.decoder.cache_argument import take_cache
from transformerfam.decoder.families import decoder_layers, family_of, require_row
from transformerfam.decoder.identity import ModelIdentity
from transformerfam.decoder.kernels import MIXED_BACK_END
from transformerfam.decoder.layouts import RELATIVE_TOLERANCE, find_layouts, relative_error
from transformerfam.decoder.peft_calls import refuse_adapters_by_place
from transformerfam.decoder.pieces import NOT_COMPILED, Inputs, read_in_pieces, state_or_new, take_over
from transformerfam.decoder.positions import warn_beyond_trained
from transformerfam.decoder.reading import READER_METHODS
from transformerfam.decoder.seams import LayerSeam, bind_method
from transformerfam.decoder.step import StepCache, run_decoder
from transformerfam.decoder.structure import check_model, check_structure, require_layers
from transformerfam.errors import StateMismatchError, TransformerFamError, UnsupportedModelError
from transformerfam.rivals.config import RivalConfig
from transformerfam.rivals.piece import Rival, RivalPiece
from transformerfam.rivals.state import Lane, RivalState
from transformerfam.versions import does_not_fit

PROBE_LENGTHS = (3, 1, 5)


def attach(model: PreTrainedModel, config: RivalConfig) -> PreTrainedModel:
    """Give `model` a rival's memory, in place; its class and weights stay as they are.

    Adds `model.rival_config`, `model.init_state()` and `model.read()`, and lets `model(...)` and `model.generate(...)`
    take a `RivalState` as `past_key_values`. That the model reads the same in pieces as at once is checked with
    numbers.

    Args:
        model: a decoder with a language-model head of a family that `convert` serves.
        config: which rival, and its choices.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family is not served, or not by this rival.
    """
    if not isinstance(config, RivalConfig):
        raise TransformerFamError(
            f"config is a {type(config).__name__}, required is a RivalConfig; RivalConfig.from_dict makes one of values"
        )
    plain = FamConfig(block_size=config.block_size, fam_length=0, num_memory_segments=0)
    check_model(model)
    require_row(model.config.model_type, "a rival")
    check_structure(model)
    decoder = model.get_decoder()
    if hasattr(decoder, "fam") or hasattr(decoder, "rival"):
        raise UnsupportedModelError("the model has a memory already; load it again to give it another one")
    back_end = model.config._attn_implementation
    if back_end not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention back end is {back_end!r}, required for a rival is 'sdpa' or 'eager'; call "
            "model.set_attn_implementation('sdpa') first"
        )
    with torch.autocast(model.device.type, enabled=False):
        layouts = find_layouts(model)
    rival = rival_class(config.system)(config, model, layouts)
    rival.identity = ModelIdentity(model)
    decoder.rival = rival
    if rival.mixes:
        model.set_attn_implementation(MIXED_BACK_END)
    family, handles = family_of(model), []
    for layer_idx, layer in enumerate(decoder_layers(model)):
        handles += LayerSeam(layer_idx, family, model.config).attach(layer)
    bind_method(decoder, "forward", read_segments)
    methods: dict[str, Callable[..., Any]] = {"init_state": init_state} | READER_METHODS
    for name, function in methods.items():
        bind_method(model, name, function)
    model.fam_config, model.rival_config = plain, config
    try:
        with torch.autocast(model.device.type, enabled=False):
            _check_pieces(model)
    except TransformerFamError:
        for handle in handles:
            handle.remove()
        del decoder.rival, decoder.forward, model.fam_config, model.rival_config
        for name in methods:
            delattr(model, name)
        model.set_attn_implementation(back_end)
        raise
    warn_beyond_trained(model.config, config.block_size)
    return model


def rival_class(system: str) -> type[Rival]:
    """Return the class of a rival, which stands in the module of its name."""
    module = importlib.import_module(f"transformerfam.rivals.{system}")
    found: type[Rival] = module.RIVAL
    return found


@torch.no_grad()
def _check_pieces(model: PreTrainedModel) -> None:
    """Read a few tokens at once and in pieces, with a small segment, and refuse a model on which that differs."""
    decoder, was_training = model.get_decoder(), model.training
    rival: Rival = decoder.rival
    config, num_tokens = rival.config, sum(PROBE_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, num_tokens), generator=generator)
    ids = ids.to(model.device)
    rival.config = RivalConfig.from_dict(config.to_dict() | {"block_size": num_tokens - 2})
    model.eval()
    try:
        whole = decoder(input_ids=ids).last_hidden_state
        state = model.init_state(1)
        pieces = [
            decoder(input_ids=part, past_key_values=state).last_hidden_state for part in ids.split(PROBE_LENGTHS, dim=1)
        ]
    finally:
        rival.config = config
        model.train(was_training)
    error, limit = relative_error(torch.cat(pieces, dim=1), whole), RELATIVE_TOLERANCE[whole.dtype]
    if not error <= limit:
        raise does_not_fit(
            f"{config.system} does not fit this model: read in pieces it gives other hidden states (relative error "
            f"{error:.1e}, allowed is {limit:.0e})"
        )


def init_state(
    self: PreTrainedModel,
    batch_size: int = 1,
    fam: torch.Tensor | None = None,
    position_offset: int = 0,
    is_saved: Any = None,
) -> RivalState:
    """Start a reading with a rival.

    Args:
        self: the model.
        batch_size: number of sequences.
        fam: memory to start from, `(1, batch_size, 1, N)` as `state.fams` gives it; None is the rival's own start.
        position_offset: not felt, since positions begin anew in every segment.
        is_saved: per sequence, whether it starts from `fam`; the others start as the rival does. None: all do.

    Returns:
        A state of `batch_size` sequences that have read nothing.

    Raises:
        TransformerFamError: a number is no integer in range, or `fam` or `is_saved` has another shape.
    """
    batch_size = require_integer("batch_size", batch_size, least=1)
    require_integer("position_offset", position_offset, least=0)
    rival: Rival = self.get_decoder().rival
    assert rival.identity is not None
    require_layers(self, len(rival.layouts))
    saved = saved_flags(is_saved, batch_size, fam is not None)
    lanes = []
    for is_from_saved in (False, True):
        rows = [row for row, flag in enumerate(saved) if flag == is_from_saved]
        if not rows:
            continue
        lane = Lane(rows, rival.initial_memory(len(rows)))
        if is_from_saved:
            assert fam is not None
            lane.memory = _unflattened(lane.memory, fam, batch_size, rows)
            lane.num_remembered = rival.config.num_memory_segments
        lanes.append(lane)
    return RivalState(lanes, rival.config, rival.identity, rival.has_memory)


def _unflattened(
    like: dict[str, torch.Tensor], fam_1BxN: torch.Tensor, batch_size: int, rows: list[int]
) -> dict[str, torch.Tensor]:
    """Return rows of `state.fams` as named tensors of the shapes of `like`."""
    sizes = [like[name][0].numel() for name in sorted(like)]
    if tuple(fam_1BxN.shape) != (1, batch_size, 1, sum(sizes)):
        raise StateMismatchError(
            f"fam has shape {tuple(fam_1BxN.shape)}, required is (1, batch, 1, numbers) "
            f"{(1, batch_size, 1, sum(sizes))}; save it from a state of the same model and configuration"
        )
    parts = fam_1BxN[0, rows, 0].split(sizes, dim=1)
    return {name: part.view_as(like[name]) for name, part in zip(sorted(like), parts, strict=True)}


@torch.compiler.disable(reason=NOT_COMPILED)
def read_segments(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: RivalState | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the decoder over tokens of any number, segment by segment; `forward` of a decoder with a rival.

    Args:
        self: the decoder.
        input_ids: `(B, T)` new tokens.
        attention_mask: `(B, T)`, 1 for tokens and 0 for padding, which takes no position, wherever it is; of a longer
            mask the last T columns count.
        position_ids: `(1 or B, T)`, from any number on; refused where they do not run on by one.
        cache: the state to advance, or `past_key_values`; None starts one.
        inputs_embeds: `(B, T, D)` instead of `input_ids`.
        use_cache: False leaves the state out of the output; None is the model's configuration.
        **kwargs: go on to the model's own forward.

    Returns:
        Hidden states `(B, T, D)` after the last norm, and the state.

    Raises:
        TransformerFamError: an argument asks for what is not done; the message names it.
        StateMismatchError: the state is another model's or rival's.
    """
    refuse_adapters_by_place(self.rival.identity.model)
    if kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False)):
        raise TransformerFamError(
            "output_router_logits is True, and a rival's rows are parted by where they stand, so it gives none; leave "
            "it out, or set it False in the model's configuration"
        )
    inputs = Inputs.of(self, input_ids, inputs_embeds, attention_mask, position_ids, use_cache, kwargs)
    state = _own_state(self.rival, take_cache(kwargs, cache), len(inputs.embeds_BTD))
    return read_in_pieces(self, state, inputs, run_lanes, kwargs)


def _own_state(rival: Rival, cache: Any, batch_size: int) -> RivalState:
    assert rival.identity is not None
    cache = state_or_new(cache, RivalState, rival.identity, batch_size)
    if cache.config != rival.config:
        raise StateMismatchError("state belongs to another model or rival; start a new one with model.init_state()")
    take_over(cache, rival.identity)
    return cache


def run_lanes(
    decoder: Any, state: RivalState, tokens_BTD: torch.Tensor, counts: list[int], kwargs: dict[str, Any]
) -> MoeModelOutputWithPast:
    """Send one piece of every sequence through the layers, lane by lane, and move the state on."""
    lanes: list[Lane] = []
    parts: list[list[torch.Tensor]] = []  # of every lane: hidden states behind the last norm, then those of layers
    for lane in state.lanes:
        by_count: dict[int, list[int]] = {}
        for i, row in enumerate(lane.rows):
            by_count.setdefault(counts[row], []).append(i)
        for count, indices in by_count.items():
            part = lane.select(indices)
            lanes.append(part)
            tokens = tokens_BTD[part.rows, :count]
            parts.append(_run_lane(decoder, part, tokens, kwargs) if count else [tokens])
    state.set_lanes(lanes)
    order = torch.argsort(torch.tensor([row for lane in lanes for row in lane.rows])).to(tokens_BTD.device)
    longest, joined = max(counts), []
    for kind in range(max(map(len, parts))):
        # A lane without tokens has one kind, which is empty.
        own = [part[min(kind, len(part) - 1)] for part in parts]
        filled = [torch.nn.functional.pad(hidden, (0, 0, 0, longest - hidden.shape[1])) for hidden in own]
        joined.append(
            torch.cat(filled)[order] if len(lanes) > 1 or lanes[0].rows != sorted(lanes[0].rows) else filled[0]
        )
    return MoeModelOutputWithPast(last_hidden_state=joined[0], hidden_states=tuple(joined[1:]) or None)


def _run_lane(decoder: Any, lane: Lane, tokens_BTD: torch.Tensor, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Send one piece of a lane through the layers, and move it on.

    Returns:
        Hidden states of the tokens `(B, T, D)`: those behind the last norm, then those of every layer if asked for.
    """
    piece = RivalPiece(decoder.rival, lane, tokens_BTD.shape[1])
    cache = StepCache(range(len(decoder.rival.layouts)), piece)
    rows = piece.rows(tokens_BTD)
    output = run_decoder(decoder, rows, piece.position_ids(rows.device), cache, **kwargs)
    piece.advance(output.last_hidden_state)
    return [hidden[:, piece.tokens] for hidden in (output.last_hidden_state, *(output.hidden_states or ()))]
