"""Give a transformers decoder a rival's memory, in place: the counterpart of `convert`."""

import importlib
from typing import cast

import torch
from transformers import PreTrainedModel

from transformerfam.decoder.kernels import MIXED_BACK_END
from transformerfam.decoder.layouts import RELATIVE_TOLERANCE, find_layouts, relative_error
from transformerfam.decoder.memory import attach_memory, detach_memory, memory_of, probing_with
from transformerfam.decoder.positions import warn_beyond_trained
from transformerfam.decoder.served import require_row
from transformerfam.decoder.slot import memory_in
from transformerfam.decoder.structure import check_model, check_structure
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.rivals.config import RivalConfig
from transformerfam.rivals.rival import Rival, RivalModel
from transformerfam.versions import does_not_fit

PROBE_LENGTHS = (3, 1, 5)


def attach(model: PreTrainedModel, config: RivalConfig, kind: type[Rival] | None = None) -> RivalModel:
    """Give `model` a rival's memory, in place; its class and weights stay as they are.

    Adds `model.rival_config`, `model.init_state()` and `model.read()`, and lets `model(...)` and `model.generate(...)`
    take a `RivalState` as `past_key_values`. That the model reads the same in pieces as at once is checked with
    numbers.

    Args:
        model: a decoder with a language-model head of a family that `convert` serves.
        config: which rival, and its choices.
        kind: a class of yours to try, in place of that of `config.system`. Its states and weights carry that name, so
            register it before you keep any.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the family is not served, or not by this rival.
    """
    if not isinstance(config, RivalConfig):
        raise TransformerFamError(
            f"config is a {type(config).__name__}, required is a RivalConfig; RivalConfig.from_dict makes one of values"
        )
    check_model(model)
    require_row(model.config.model_type, "a rival")
    check_structure(model)
    if memory_in(model.get_decoder()) is not None:
        raise UnsupportedModelError("the model has a memory already; load it again to give it another one")
    back_end = model.config._attn_implementation
    if back_end not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention back end is {back_end!r}, required for a rival is 'sdpa' or 'eager'; call "
            "model.set_attn_implementation('sdpa') first"
        )
    with torch.autocast(model.device.type, enabled=False):
        layouts = find_layouts(model)
    rival = (kind or rival_class(config.system))(config, model, layouts)
    handles = attach_memory(model, rival)
    if rival.mixes:
        rival.base_back_end = back_end
        model.set_attn_implementation(MIXED_BACK_END)
    try:
        with torch.autocast(model.device.type, enabled=False):
            _check_pieces(model)
    except TransformerFamError:
        detach_memory(model, handles)
        model.set_attn_implementation(back_end)
        raise
    warn_beyond_trained(model.config, config.block_size)
    return cast(RivalModel, model)


def rival_class(system: str) -> type[Rival]:
    """Return the class of a rival, which is in the module of its name."""
    module = importlib.import_module(f"transformerfam.rivals.{system}")
    found: type[Rival] = module.RIVAL
    return found


@torch.no_grad()
def _check_pieces(model: PreTrainedModel) -> None:
    """Read a few tokens at once and in pieces, with a small segment, and refuse a model on which that differs."""
    decoder, config, num_tokens = model.get_decoder(), memory_of(model).config, sum(PROBE_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, num_tokens), generator=generator)
    ids = ids.to(model.device)
    with probing_with(model, RivalConfig.from_dict(config.to_dict() | {"block_size": num_tokens - 2})):
        whole = decoder(input_ids=ids).last_hidden_state
        state = model.init_state(1)
        pieces = [
            decoder(input_ids=part, past_key_values=state).last_hidden_state for part in ids.split(PROBE_LENGTHS, dim=1)
        ]
    error, limit = relative_error(torch.cat(pieces, dim=1), whole), RELATIVE_TOLERANCE[whole.dtype]
    if not error <= limit:
        raise does_not_fit(
            f"{config.system} does not fit this model: read in pieces it gives other hidden states (relative error "
            f"{error:.1e}, allowed is {limit:.0e})"
        )
