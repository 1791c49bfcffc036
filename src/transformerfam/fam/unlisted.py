"""Numeric checks for a family that has no row in the table: what its names promise is not believed.

The checks of `seams` say that the four seams do what the algorithm says for a few tokens. A layer may do more:
choose among many keys, slide by a window that its configuration does not name, mix tokens by a convolution, depend on
the absolute position. For a family with a row its tests have looked; here numbers do, on the model at hand.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transformerfam.decoder.kernels import BACK_END
from transformerfam.decoder.layouts import relative_error
from transformerfam.decoder.parameters import require_at_hand
from transformerfam.decoder.served import usual_families
from transformerfam.decoder.slot import memory_in
from transformerfam.errors import TransformerFamError, UnsupportedModelError
from transformerfam.fam.checks import PROBE_BLOCK_SIZE, PROBE_FAM_LENGTH, Watch, probing, require_equal
from transformerfam.fam.layer_checks import check_layers
from transformerfam.fam.memory import memory_of

BACK_ENDS = ("eager", "sdpa")


def convert_by_checks(model: PreTrainedModel, convert_as: Callable[[], None]) -> None:
    """Convert a model whose family has no row as the first of the usual families that passes all checks.

    Args:
        model: not converted, with `decoder.fam_family` not set.
        convert_as: converts the model as its decoder's `fam_family`, or refuses and leaves it as it was.

    Raises:
        UnsupportedModelError: none passes; says what each fails.

    Warns:
        UserWarning: one passes; names it.
    """
    decoder, model_type = model.get_decoder(), model.config.model_type
    start = f"model type {model_type!r} has no row in the table of families (transformerfam.decoder.families.FAMILIES)"
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(f"{start}, and its decoder has no list `layers`, whose parts could be tried")
    families = usual_families(layers[0], model.config)
    if not families:
        parts = ", ".join(name for name, _ in layers[0].named_children())
        raise UnsupportedModelError(
            f"{start}, and the parts of its layers do not have the usual names (self_attn with o_proj, "
            f"input_layernorm, post_attention_layernorm, mlp), by which they could be tried: "
            f"{type(layers[0]).__name__} has {parts}"
        )
    if model.config._attn_implementation not in BACK_ENDS:
        raise UnsupportedModelError(
            f"{start}, and to try its layers attention back end 'sdpa' or 'eager' is required, not "
            f"{model.config._attn_implementation!r}; call model.set_attn_implementation('sdpa') first"
        )
    reasons: list[str] = []
    with neutral_weights_drawn(model):
        decoder.fam_family = families[0]
        try:
            check_layers(model)
            for family in families:
                decoder.fam_family = family
                try:
                    convert_as()
                except TransformerFamError as error:
                    reasons.append(f"as {family.name}'s they fail: {getattr(error, 'reason', error)}")
                else:
                    break
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{start}, and its layers are not such as can be tried: {error}") from error
        finally:
            if memory_in(decoder) is None:
                del decoder.fam_family
    if len(reasons) == len(families):
        raise UnsupportedModelError(f"{start}, and numeric checks do not accept its layers; {'; '.join(reasons)}")
    warnings.warn(
        f"model type {model_type!r} has no row in the table of families; numeric checks on this model say that its "
        f"layers are put together as {family.name}'s, and it is converted so, though no test compares this family with "
        "the reference",
        stacklevel=3,
    )


@contextlib.contextmanager
def neutral_weights_drawn(model: PreTrainedModel) -> Iterator[None]:
    """Replace a decoder's vectors and constant weights by random values, and restore them.

    A norm's weight of 1, a bias of 0 or a gate that has not been trained yet would hide what the layer does with it.
    """
    generator = torch.Generator().manual_seed(0)
    kept = {id(weight) for weight in model.get_input_embeddings().parameters()}
    kept |= {id(table) for table in model.get_decoder().rotary_emb.buffers()}  # from which turning is found out
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, weight in model.get_decoder().state_dict(keep_vars=True).items():
        require_at_hand(f"the weight {name}", weight)
        if id(weight) in kept or not weight.is_floating_point() or not weight.numel():
            continue
        flat = weight.detach().flatten()
        if weight.dim() < 2 or all(bool((part == flat[0]).all()) for part in (flat[:64], flat)):
            own.append((weight, weight.detach().clone()))
    try:
        with torch.no_grad():
            for weight, value in own:
                factor, addend = torch.rand((2, *value.shape), generator=generator).to(value.device, torch.float32)
                drawn = value.float() * (0.75 + 0.5 * factor) + 0.1 * (addend - 0.5)
                weight.copy_(drawn.to(value.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, value in own:
                weight.copy_(value)


@torch.no_grad()
def own_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return a model's logits for two probing blocks, `(1, T, V)`."""
    generator, was_training = torch.Generator().manual_seed(4), model.training
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, 2 * PROBE_BLOCK_SIZE), generator=generator)
    model.eval()
    try:
        logits: torch.Tensor = model(input_ids=ids.to(model.device)).logits
    finally:
        model.train(was_training)
    return logits


@torch.no_grad()
def check_converted(model: PreTrainedModel, expected_BTV: torch.Tensor) -> None:
    """Refuse a converted model whose head or back end does something else than before.

    Args:
        model: converted.
        expected_BTV: its `own_logits` before conversion.

    Raises:
        UnsupportedModelError: without FAM it gives other logits, or back end `fam` leaves something out that the class
            hands to attention.
    """
    with probing(model, fam_length=0, fam_layers=None):
        logits = own_logits(model)
    if logits.dtype in (torch.float32, torch.float64):  # in others rounding chooses other experts
        error = relative_error(logits, expected_BTV)
        if not error <= 1e-3:
            raise UnsupportedModelError(
                f"without FAM it gives other logits than before conversion (relative error {error:.1e})"
            )
    _check_back_ends(model)


def _check_back_ends(model: PreTrainedModel) -> None:
    """A converted model on back end `fam` must give what it gives on `eager`, with a gated memory, too."""
    decoder, memory = model.get_decoder(), memory_of(model)
    if model.config._attn_implementation != BACK_END:
        return
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, 3 * PROBE_BLOCK_SIZE), generator=generator)
    ids = ids.to(model.device)
    changes: dict[str, Any] = {"fam_update": "gated"} if memory.config.fam_length else {"fam_length": 0}
    found, fams = [], []
    try:
        with probing(model, **changes):
            shape = (len(memory.layouts), PROBE_FAM_LENGTH, model.config.hidden_size)
            fam = torch.randn(shape, generator=generator) if memory.config.fam_length else None
            first = None
            for back_end in ("eager", BACK_END):
                model.set_attn_implementation(back_end)
                state = model.init_state(1, fam=fam)
                with Watch(model, first) as watch:
                    decoder(input_ids=ids, past_key_values=state)
                first = watch if first is None else first
                found.append(watch)
                fams += [state.fams] if memory.config.fam_length else []
    finally:
        model.set_attn_implementation(BACK_END)
    found[1].require_equal("attention back end")
    if memory.config.fam_length:
        require_equal("attention back end", *(each.to(model.dtype) for each in reversed(fams)))
