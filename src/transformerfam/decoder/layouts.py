"""Find out, with numbers, what every layer of a model hands to its cache, and how it turns with the position."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from transformerfam.decoder.cache_argument import as_cache
from transformerfam.decoder.flash import FLASH_BACK_ENDS
from transformerfam.decoder.positions import Turner
from transformerfam.decoder.served import decoder_layers, own_windows
from transformerfam.errors import UnsupportedModelError
from transformerfam.versions import does_not_fit

PROBE_LENGTH = 8
PROBE_DISTANCE = 7
RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""By the model's type, of the largest entry; angles are float32 in all of transformers, whatever the model's type."""


def inverse_frequencies(rotary: Any) -> list[torch.Tensor]:
    """Return the angles per position of a rotary embedding: one table, or one per kind of layer."""
    named = rotary.named_buffers()
    return [table for name, table in named if name.endswith("inv_freq") and "original" not in name]


def relative_error(there: torch.Tensor, required: torch.Tensor) -> float:
    """Return the largest difference, in parts of the largest required entry."""
    return float((there - required).abs().max() / required.abs().max().clamp(min=1e-6))


class _Recorder(Cache):
    """Keep what every layer hands over last."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.handed_over: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.handed_over[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return 0: nothing was read before."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return what a first input has."""
        return query_length, 0


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """What one layer hands to its cache, found out by conversion.

    Attributes:
        key_shape: heads and width of what it hands over as keys.
        value_shape: of what it hands over as values.
        turner: turns both.
        window: the layer's own sliding window in tokens, or None.
    """

    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    turner: Turner
    window: int | None


@torch.no_grad()
def find_layouts(model: PreTrainedModel) -> list[LayerLayout]:
    """Run a few tokens through a model that is not converted yet, at two places, and find every layer's layout.

    Raises:
        UnsupportedModelError: names the layer whose keys turn in a way that is not known, or the types of weights that
            do not go together.

    Source: RoPE; DESIGN, "Positions stay small".
    """
    decoder, was_training = model.get_decoder(), model.training
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (1, PROBE_LENGTH), generator=generator).to(model.device)
    inputs: dict[int, torch.Tensor] = {}

    def same_input(layer_idx: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a layer at both places what it got at the first, so that its keys differ by the position alone."""
        return inputs.setdefault(layer_idx, args[0]), *args[1:]

    mask = torch.zeros(1, 1, *ids.shape[1:] * 2, dtype=model.dtype, device=ids.device)
    takes_no_mask = model.config._attn_implementation in FLASH_BACK_ENDS
    layers = decoder_layers(model)
    handles = [layer.register_forward_pre_hook(functools.partial(same_input, i)) for i, layer in enumerate(layers)]
    recorders = []
    model.eval()
    try:
        for start in (0, PROBE_DISTANCE):
            recorder = _Recorder()
            decoder(
                input_ids=ids,
                attention_mask=None if takes_no_mask else mask,
                position_ids=torch.arange(start, start + PROBE_LENGTH, device=ids.device)[None],
                **as_cache(recorder),
            )
            recorders.append(recorder.handed_over)
    except RuntimeError as error:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
        if len(dtypes) == 1:
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} has weights of types {' and '.join(dtypes)} and cannot run with them ({error}); "
            "load it in one type, with dtype=..."
        ) from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    turners = list(_known_turners(decoder.rotary_emb))
    layouts = []
    for layer_idx, window in enumerate(own_windows(model.config)):
        here, later = (handed_over.get(layer_idx) for handed_over in recorders)
        if here is None or later is None:
            raise does_not_fit(f"the cache seam does not fit this model: layer {layer_idx} hands no keys to its cache")
        turner = _fitting(turners, here, later)
        if turner is None:
            raise does_not_fit(
                f"the position seam does not fit this model: what layer {layer_idx} keeps does not turn with the "
                "position in any way that conversion knows"
            )
        key_shape, value_shape = ((kept.shape[1], kept.shape[3]) for kept in here)
        layouts.append(LayerLayout(key_shape, value_shape, turner, window))
    return layouts


def _known_turners(rotary: Any) -> Iterator[Turner]:
    """Yield every known way in which positions turn what a layer keeps, the most common first."""
    tables = inverse_frequencies(rotary)
    for is_in_values in (False, True):
        for is_interleaved in (False, True):
            for is_at_end in (False, True):
                for sign in (1, -1):
                    for index, table in enumerate(tables):
                        yield Turner(sign * table, is_interleaved, is_at_end, is_in_values, (index, sign))
    yield Turner(None)


def _fitting(
    turners: list[Turner], here: tuple[torch.Tensor, torch.Tensor], later: tuple[torch.Tensor, torch.Tensor]
) -> Turner | None:
    """Return the first way that takes what a layer kept at one place to what it kept at the other."""
    tolerance = RELATIVE_TOLERANCE[here[0].dtype]
    for turner in turners:
        rotary = here[turner.is_in_values]
        if turner.inverse_frequencies is not None and 2 * len(turner.inverse_frequencies) > rotary.shape[-1]:
            continue
        turned = turner.turn(*here, PROBE_DISTANCE)
        if all(relative_error(there, required) <= tolerance for there, required in zip(turned, later, strict=True)):
            return turner
    return None


def with_tables_of(decoder: Any, layouts: Sequence[LayerLayout]) -> tuple[LayerLayout, ...]:
    """Return layouts whose keys turn by the tables that a decoder has now: `model.to(dtype)` rounds those, too."""
    tables = inverse_frequencies(decoder.rotary_emb)
    turners = {turner: turner.with_tables(tables) for turner in {layout.turner for layout in layouts}}
    return tuple(dataclasses.replace(layout, turner=turners[layout.turner]) for layout in layouts)
