"""A family without a row: found by numbers where its layers are usual ones, refused with the reason otherwise."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_families import CONFIG, SHAPE, config_of, draw_ids, make_tiny, read_in_chunks
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from transformerfam import FamState, convert, from_pretrained
from transformerfam.decoder.cache_argument import CACHE_NAME
from transformerfam.decoder.families import FAMILIES, NOT_SERVED
from transformerfam.decoder.served import family_of
from transformerfam.errors import UnsupportedModelError
from transformerfam.fam.convert import fam_parameters
from transformerfam.rivals import RivalConfig, attach


class MadeUpConfig(LlamaConfig):
    """Llama's configuration under a name that no table has."""

    model_type = "made_up"


class MadeUpForCausalLM(LlamaForCausalLM):
    """Llama's layers under a name that no table has."""

    config_class = MadeUpConfig


def make_made_up(**changes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MadeUpForCausalLM(MadeUpConfig(**SHAPE | changes)).eval()


def convert_unlisted(model: Any, config: Any = CONFIG) -> Any:
    with pytest.warns(UserWarning, match="has no row in the table of families; numeric checks on this model say"):
        return convert(model, config)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    for rows in fam_parameters(model):
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)))
    return read_in_chunks(model, draw_ids(2, 23), [4, 19])[0]


@pytest.mark.parametrize("options", ["default", "gated", "block"])
def test_made_up_family_reads_as_the_one_that_it_is_built_as(options: str) -> None:
    """Catches a family found by numbers that is attached in another way than its row would have it."""
    config = config_of("llama", options)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    llama.load_state_dict(make_made_up().state_dict())
    found = convert_unlisted(make_made_up(), config)
    assert family_of(found).name == "Llama"
    torch.testing.assert_close(logits_of(found), logits_of(convert(llama, config)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("gemma2", "Gemma 2"),
        ("gemma3_text", "Gemma 2"),
        ("olmo2", "OLMo 2"),
        ("glm4", "GLM-4-0414"),
        ("vaultgemma", "VaultGemma"),
        ("cohere", "StableLM in parallel"),
        ("persimmon", "Llama"),
        ("deepseek_v3", "Llama"),
    ],
)
def test_families_are_found_without_their_row(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an order of parts that is taken for another one, and weights that the checks leave changed."""
    expected = logits_of(convert(make_tiny(case), CONFIG))
    monkeypatch.delitem(FAMILIES, case.split()[0])
    model = make_tiny(case)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    convert_unlisted(model)
    assert family_of(model).name == name
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-4)


def test_saved_and_copied_model_is_found_again(tmp_path: Path) -> None:
    """Catches a family that only the process that found it knows."""
    model = convert_unlisted(make_made_up())
    expected = logits_of(model)
    with torch.no_grad():
        assert torch.equal(read_in_chunks(copy.deepcopy(model), draw_ids(2, 23), [4, 19])[0], expected)
    model.save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="model type 'made_up' has no row"):
        loaded: Any = from_pretrained(tmp_path / "model", kind=MadeUpForCausalLM)
    with torch.no_grad():
        state = model.read(draw_ids(1, 13))
        state.save(tmp_path / "state.safetensors")
        more = draw_ids(1, 9, seed=1)
        required = model(input_ids=more, past_key_values=state).logits
        resumed = FamState.load(tmp_path / "state.safetensors", loaded)
        assert torch.equal(loaded(input_ids=more, past_key_values=resumed).logits, required)


def test_bfloat16_is_tried_too() -> None:
    """Catches tolerances that only float32 meets."""
    convert_unlisted(make_made_up(initializer_range=0.02, max_position_embeddings=131072).to(torch.bfloat16))


def test_stored_table_of_rope_is_not_drawn() -> None:
    """Catches kept keys that turn by angles that were drawn for the checks."""
    expected = logits_of(convert_unlisted(make_made_up()))
    model = make_made_up()
    rotary = model.model.rotary_emb
    table = rotary.inv_freq.clone()
    del rotary.inv_freq
    rotary.register_buffer("inv_freq", table, persistent=True)
    torch.testing.assert_close(logits_of(convert_unlisted(model)), expected, atol=1e-6, rtol=1e-5)


def test_without_fam_it_is_tried_too() -> None:
    convert_unlisted(make_made_up(), CONFIG.replace(fam_length=0))


class _ShiftedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.3 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class _ScaledLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = self.scale * hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _scale(model: Any, layer_idx: int, value: float) -> None:
    layer = model.model.layers[layer_idx]
    layer.__class__ = _ScaledLayer
    layer.scale = nn.Parameter(torch.full((), value))


def _shift(model: Any) -> None:
    model.model.layers[1].mlp.__class__ = _ShiftedMLP


def _add_first_input(model: Any) -> None:
    first: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: first.insert(0, args[0]))
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0] + 0.1 * first[0], *args[1:]))


def _run_twice(model: Any) -> None:
    layers = model.model.layers
    layers[1].forward = lambda *args, forward=layers[1].forward, **kwargs: layers[0](forward(*args, **kwargs), **kwargs)


def _use_ids(model: Any) -> None:
    decoder, forward = model.model, model.model.forward

    def add_previous(input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = decoder.embed_tokens(input_ids) + decoder.embed_tokens(input_ids.roll(1, 1))
        return forward(inputs_embeds=inputs_embeds, **kwargs)

    decoder.forward = add_previous


def _grow_with_keys(model: Any) -> None:
    attention = model.model.layers[1].self_attn

    def forward(*args: Any, forward: Any = attention.forward, attention_mask: Any, **kwargs: Any) -> Any:
        attention.scaling = 8**-0.5 * attention_mask.shape[-1] ** 0.5
        return forward(*args, attention_mask=attention_mask, **kwargs)

    attention.forward = forward


def _grow_with_position(model: Any) -> None:
    attention = model.model.layers[1].self_attn

    def forward(*args: Any, forward: Any = attention.forward, position_ids: Any, **kwargs: Any) -> Any:
        attention.scaling = 8**-0.5 * (1 + 0.3 * float(position_ids.max() // 300))
        return forward(*args, position_ids=position_ids, **kwargs)

    attention.forward = forward


def _grow_slowly(model: Any) -> None:
    attention = model.model.layers[1].self_attn

    def forward(*args: Any, forward: Any = attention.forward, position_ids: Any, **kwargs: Any) -> Any:
        attention.scaling = 8**-0.5 * (1 + 0.02 * float(torch.log1p(position_ids.max() // 128)))
        return forward(*args, position_ids=position_ids, **kwargs)

    attention.forward = forward


def _hooked_layer(model: Any, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    layer = model.model.layers[2]

    def forward(*args: Any, forward: Any = layer.forward, position_ids: Any, **kwargs: Any) -> Any:
        return change(forward(*args, position_ids=position_ids, **kwargs), position_ids[..., None])

    layer.forward = forward


class _FullExperts(LlamaMLP):
    """Gives nothing to tokens after the eighth of those that go one way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        way = x[..., 0] > 0
        places = torch.where(way, way.cumsum(1), (~way).cumsum(1))
        return super().forward(x) * (places <= max(2, x.shape[1] * 3 // 4))[..., None]


def _forget_late_tokens(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(
        lambda _m, _a, output: torch.cat((output[:, :96], 0 * output[:, 96:]), dim=1)
    )


def _fill_experts(model: Any) -> None:
    model.model.layers[1].mlp.__class__ = _FullExperts


def _keep_values_of_lower_layer(model: Any) -> None:
    first: list[torch.Tensor] = []
    layers = model.model.layers
    layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _a, output: first.insert(0, output))
    layers[2].self_attn.v_proj.register_forward_hook(lambda _m, _a, output: output + 0.3 * first[0])


def _embed_in_every_layer(model: Any) -> None:
    ids: list[torch.Tensor] = []
    embedding = model.model.embed_tokens
    embedding.register_forward_pre_hook(lambda _m, args: ids.insert(0, args[0]))
    model.model.layers[2].mlp.register_forward_hook(
        lambda _m, _a, output: output + nn.functional.embedding(ids[0], embedding.weight)
    )


class _HalvingForCausalLM(MadeUpForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if isinstance(getattr(output, CACHE_NAME), FamState):
            output.logits = output.logits / 2
        return output


def _halve_logits_beside_a_state(model: Any) -> None:
    model.__class__ = _HalvingForCausalLM


def _rename(model: Any) -> None:
    for layer in model.model.layers:
        layer.attn = layer.self_attn
        del layer.self_attn


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "tokens mixed by the feed-forward": (_shift, "mix tokens by something else than attention"),
    "residual with a factor that is 1 now": (lambda model: _scale(model, 0, 1.0), "the first residual seam"),
    "residual with a factor in the last layer": (lambda model: _scale(model, 2, 0.5), "the first residual seam"),
    "input of the lowest layer added above": (_add_first_input, "layer 2 is not given what the layer below gave"),
    "layer that runs twice": (_run_twice, "do not run once each, one after the other: they ran as \\[0, 1, 0, 2\\]"),
    "token ids used besides their embeddings": (_use_ids, "which it uses elsewhere, too"),
    "attention that counts keys": (_grow_with_keys, "the attention of layer 1 gives something else .* counts them"),
    "attention that knows the position": (_grow_with_position, "the queries' size in layer 1 changes with the absol"),
    "queries that grow slowly": (_grow_slowly, "the queries' size in layer 1 changes with the absolute position"),
    "layer that goes by the place in 16 tokens": (
        lambda model: _hooked_layer(model, lambda out, at: torch.where(at % 16 == 15, -out, out)),
        "layer 2 changes with the absolute position",
    ),
    "layer that is stronger after some tokens": (
        lambda model: _hooked_layer(model, lambda out, at: out * (1 + 0.5 * (at >= 64))),
        "layer 2 changes with the absolute position",
    ),
    "layer that grows": (
        lambda model: _hooked_layer(model, lambda out, at: out * (1 + 1e-5 * at)),
        "layer 2 changes with the absolute position",
    ),
    "experts with a limited capacity": (_fill_experts, "share something out among the tokens"),
    "layer that stops after many tokens": (_forget_late_tokens, "share something out among the tokens"),
    "values of a lower layer": (_keep_values_of_lower_layer, "layer 2 changes with .* another layer's input"),
    "embeddings in a layer": (_embed_in_every_layer, "layer 2 changes with the token ids"),
    "head that looks at the cache": (_halve_logits_beside_a_state, "without FAM it gives other logits"),
    "parts of other names": (_rename, "MadeUpDecoderLayer has|LlamaDecoderLayer has .*attn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_do_more_than_they_seem_to_are_refused(name: str) -> None:
    """Catches a family that would be served by its parts' names, wrongly."""
    change, match = REFUSED[name]
    model = make_made_up()
    change(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=match) as refusal:
        convert(model, CONFIG)
    assert str(refusal.value).startswith("model type 'made_up' has no row in the table of families")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    assert not hasattr(model, "read")
    assert not hasattr(model.model, "fam_family")
    assert model.config._attn_implementation == "sdpa"


def test_window_that_the_configuration_does_not_name_is_refused() -> None:
    """Catches layers that slide beyond what a few tokens show, and would see all after conversion."""

    class SlidingConfig(MistralConfig):
        model_type = "made_up_sliding"

    model = MistralForCausalLM(SlidingConfig(**SHAPE, sliding_window=4096))
    convert_unlisted(copy.deepcopy(model))
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(UnsupportedModelError, match="layer 0 sees the last 4096 tokens, .* configuration says all"):
        convert(model, CONFIG)


def test_neutral_weights_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches keys that turn as long as the norm after RoPE has weights of 1, as before training."""
    monkeypatch.delitem(NOT_SERVED, "hunyuan_v1_dense")
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = transformers.HunYuanDenseV1Config(**SHAPE | {"pad_token_id": 0}, head_dim=8, rope_parameters=rope)
    model = transformers.HunYuanDenseV1ForCausalLM(config)
    assert set(model.model.layers[0].self_attn.key_layernorm.weight.tolist()) == {1.0}
    with pytest.raises(UnsupportedModelError, match="changes with the absolute position|position seam"):
        convert(model, CONFIG)


def test_attention_that_chooses_among_many_keys_is_refused() -> None:
    """Catches sparse attention, which sees all of a few keys."""
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**SHAPE))
    with pytest.raises(UnsupportedModelError, match="sees each of 8 keys 1200 times"):
        convert(model, CONFIG)


def test_back_end_that_gives_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what the class hands to attention and this package's back end leaves out."""
    from transformerfam.decoder import kernels

    original = kernels.attend_rows

    def halved(*args: Any, **kwargs: Any) -> Any:
        rows, share = original(*args, **kwargs)
        return rows, share / 2

    monkeypatch.setattr(kernels, "attend_rows", halved)
    with pytest.raises(UnsupportedModelError, match="the attention back end seam does not fit this model"):
        convert(make_made_up(), CONFIG)


def test_other_back_ends_are_asked_for_first() -> None:
    model = make_made_up()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="back end 'sdpa' or 'eager' is required, not 'flex_attention'"):
        convert(model, CONFIG)


def test_rivals_need_a_row() -> None:
    with pytest.raises(UnsupportedModelError, match="'made_up' has no row in the table of families, which a rival nee"):
        attach(make_made_up(), RivalConfig(system="rmt"))


LINEAR = ["linear_attention", "full_attention", "linear_attention"]
LINEAR_SHAPE = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": LINEAR,
    "head_dim": 8,
}
LOOKED_AT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "Qwen3-Next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        LINEAR_SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "layer of type 'linear_attention', whose recurrent state",
    ),
    "Qwen3.5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        LINEAR_SHAPE,
        "layer of type 'linear_attention', whose recurrent state",
    ),
    "Llama 4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
        "layer of type 'chunked_attention', where the first token of a chunk",
    ),
    "HunYuan": (
        "HunYuanDenseV1Config",
        "HunYuanDenseV1ForCausalLM",
        {"head_dim": 8, "pad_token_id": 0},
        "HunYuanDenseV1ForCausalLM is not served: its keys go through a norm with weights after RoPE",
    ),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {"head_dim": 8, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 0, "intermediate_size": [48] * 3},
        "Gemma3nForCausalLM is not served: its layers pass four streams",
    ),
    "Gemma 4 E2B": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 0},
        "its layers are given embeddings of the token ids",
    ),
    "Gemma 4 with shared keys": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3},
        "its upper layers take the keys of lower ones",
    ),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_family_that_cannot_be_served_is_refused_with_the_reason(name: str) -> None:
    """Catches a refusal that names something else than what is in the way."""
    config_name, model_name, options, match = LOOKED_AT[name]
    config = getattr(transformers, config_name)(**SHAPE | options)
    with pytest.raises(UnsupportedModelError, match=match):
        convert(getattr(transformers, model_name)(config), CONFIG)


def test_slots_of_unlike_layers_are_refused() -> None:
    """Catches slots of two widths in one state."""
    model = make_tiny("gemma4_text", layer_types=["sliding_attention", "full_attention", "full_attention"])
    config = config_of("llama", "block")
    with pytest.raises(UnsupportedModelError, match="name layers of one shape in fam_layers"):
        convert(copy.deepcopy(model), config.replace(fam_layers=(0, 1, 2)))
    converted: Any = convert(model, config)
    assert converted.read(draw_ids(1, 13)).fams.shape == (3, 1, 2, 16 + 16)


def test_rows_of_the_table_warn_of_nothing() -> None:
    """Catches the warning of a family without a row where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(make_tiny("llama"), CONFIG)
