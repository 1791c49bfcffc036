"""Check on the model at hand, with numbers, that the four seams do what the algorithm says."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from transformerfam.config import FamConfig
from transformerfam.errors import UnsupportedModelError
from transformerfam.kernels import BACK_END

PROBE_BLOCK_SIZE = 4
PROBE_FAM_LENGTH = 2
RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
ATTENTION_BACK_ENDS = ("eager", "sdpa", BACK_END)


def check_structure(model: Any, config: FamConfig, served: Sequence[str]) -> None:
    """Refuse a model whose parts are not where the seams need them.

    Raises:
        UnsupportedModelError: with the part that does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model is a {type(model).__name__}, required is a transformers model with a language-model head; load one "
            "with AutoModelForCausalLM.from_pretrained, and convert before PEFT wraps it"
        )
    name = type(model).__name__
    model_type = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model, required is a decoder alone")
    if model.get_output_embeddings() is None or not model.can_generate():
        raise UnsupportedModelError(
            f"{name} has no language-model head or is an encoder; required is a causal decoder, loaded with "
            "AutoModelForCausalLM"
        )
    decoder = model.get_decoder()
    if not hasattr(decoder, "rotary_emb") or not hasattr(decoder.rotary_emb, "inv_freq"):
        raise UnsupportedModelError(
            f"{name} has no rotary position embedding (RoPE), which the memory's positions need; choose a model with "
            "RoPE"
        )
    if model_type not in served:
        raise UnsupportedModelError(f"model type {model_type!r} is not served, required is one of {', '.join(served)}")
    if model.config._attn_implementation not in ATTENTION_BACK_ENDS:
        raise UnsupportedModelError(
            f"attention back end is {model.config._attn_implementation!r}, required is one of "
            f"{', '.join(ATTENTION_BACK_ENDS)}; call model.set_attn_implementation('sdpa') first"
        )
    rope_type = decoder.rotary_emb.rope_type
    if rope_type in ("dynamic", "longrope"):
        raise UnsupportedModelError(
            f"RoPE of type {rope_type!r} changes with the length of the text, so keys cannot be turned; set another "
            "type"
        )
    num_layers = len(decoder.layers)
    if config.fam_layers is not None and max(config.fam_layers) >= num_layers:
        raise UnsupportedModelError(
            f"fam_layers names layer {max(config.fam_layers)}, the model has layers 0 to {num_layers - 1}"
        )


class _Recorder(Cache):
    """Keep every layer's last keys."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: dict[int, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[layer_idx] = key_states
        return key_states, value_states


@contextlib.contextmanager
def _probing(model: PreTrainedModel, **changes: Any) -> Iterator[None]:
    """Put a small configuration in force for a probe, without dropout."""
    memory, was_training = model.get_decoder().fam, model.training
    config = memory.config
    probe = {
        "block_size": PROBE_BLOCK_SIZE,
        "fam_length": PROBE_FAM_LENGTH,
        "num_memory_segments": 1,
        "fam_key_bias": 0.0,
    }
    memory.config = FamConfig(**probe | {"fam_layers": config.fam_layers} | changes)
    model.eval()
    try:
        yield
    finally:
        memory.config = config
        model.train(was_training)


@torch.no_grad()
def check_seams(model: PreTrainedModel) -> None:
    """Run a few tokens through the converted model and compare with what the algorithm says.

    Raises:
        UnsupportedModelError: names the seam that fails, and by how much.

    Source: DESIGN, "How FAM enters a model".
    """
    vocab_size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, 2 * PROBE_BLOCK_SIZE), generator=generator).to(model.device)
    _check_cache_and_mask(model, ids)
    _check_positions(model, ids)
    if model.get_decoder().fam.config.fam_length:
        _check_rows(model, ids)
        _check_first_residual(model, ids)


def _require_equal(seam: str, there: torch.Tensor, required: torch.Tensor) -> None:
    error = float((there - required).abs().max() / required.abs().max().clamp(min=1e-6))
    limit = RELATIVE_TOLERANCE[required.dtype]
    if not error <= limit:  # also refuses NaN
        raise UnsupportedModelError(
            f"the {seam} seam does not fit this model: relative error {error:.1e}, allowed is {limit:.0e}; the "
            "family's forward in this transformers version differs from what conversion knows"
        )


def _require_changed(seam: str, there: torch.Tensor, before: torch.Tensor) -> None:
    if torch.equal(there, before):
        raise UnsupportedModelError(
            f"the {seam} seam does not fit this model: what must reach it has no effect; the family's forward in this "
            "transformers version differs from what conversion knows"
        )


def _check_cache_and_mask(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """With a block as long as the input and no FAM, the pieces must give the base model's hidden states."""
    decoder = model.get_decoder()
    base = type(decoder).forward(decoder, input_ids=ids, use_cache=False).last_hidden_state
    with _probing(model, block_size=ids.shape[1], fam_length=0, fam_layers=None, num_memory_segments=0):
        state = model.init_state(1)
        parts = [decoder(input_ids=part, past_key_values=state).last_hidden_state for part in ids.split((3, 5), dim=1)]
    _require_equal("cache", torch.cat(parts, dim=1), base)


def _check_positions(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Keys turned by a distance must be the keys that stand so much further on."""
    decoder = model.get_decoder()
    distance = 7
    keys = []
    for start in (0, distance):
        recorder = _Recorder()
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=model.dtype, device=ids.device)
        type(decoder).forward(
            decoder, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=recorder
        )
        keys.append(recorder.keys[0])
    _require_equal("position", decoder.fam.turner.turn(keys[0], distance), keys[1])


def _check_rows(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """The FAM must reach the tokens, the block must reach the FAM, and no token may see a later one."""
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    saved = torch.randn(
        len(layers), PROBE_FAM_LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % model.get_input_embeddings().num_embeddings
    with _probing(model):
        results = []
        for tokens, fam in ((ids, saved), (ids, -saved), (changed, saved)):
            state = model.init_state(1, fam=fam)
            results.append((decoder(input_ids=tokens, past_key_values=state).last_hidden_state, state.fams))
    (hidden, fams), (hidden_other_fam, _), (hidden_changed, fams_changed) = results
    _require_changed("row", hidden_other_fam[:, 0], hidden[:, 0])
    _require_changed("row", fams_changed, fams)
    _require_equal("mask", hidden_changed[:, :-1], hidden[:, :-1])


def _check_first_residual(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """In the first update, what goes on behind attention must be the attention output alone."""
    decoder = model.get_decoder()
    layer_idx = next(i for i in range(len(decoder.layers)) if decoder.fam.config.carries_fam(i))
    layer = decoder.layers[layer_idx]
    seen: dict[str, torch.Tensor] = {}

    def note_output(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen["attention"] = output[:, :PROBE_FAM_LENGTH]

    def note_input(module: nn.Module, args: Any) -> None:
        seen["behind"] = args[0][:, :PROBE_FAM_LENGTH]

    handles = [
        layer.self_attn.o_proj.register_forward_hook(note_output),
        layer.post_attention_layernorm.register_forward_pre_hook(note_input),
    ]
    try:
        with _probing(model, fam_init=decoder.fam.config.fam_init):
            state = model.init_state(1, fam=_any_fam(model))
            state.starts_from_saved_fam = [False]
            decoder(input_ids=ids[:, :PROBE_BLOCK_SIZE], past_key_values=state)
    finally:
        for handle in handles:
            handle.remove()
    _require_equal("first residual", seen["behind"], seen["attention"])


def _any_fam(model: PreTrainedModel) -> torch.Tensor:
    shape = (len(model.get_decoder().layers), PROBE_FAM_LENGTH, model.config.hidden_size)
    scale = float(model.get_input_embeddings().weight.float().std())
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(2))
