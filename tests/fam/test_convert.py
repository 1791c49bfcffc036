"""Conversion: what it keeps, what it adds, and every model that it refuses."""

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_families import make_tiny
from tiny_llama import make_tiny_llama, random_ids
from transformers import (
    AfmoeConfig,
    AfmoeForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

from transformerfam import FamConfig, convert
from transformerfam.decoder.cache_argument import as_cache
from transformerfam.decoder.positions import Turner
from transformerfam.errors import ReadInterrupted, TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import fam_parameters, memory_of, set_block_size, set_key_bias
from transformerfam.fam.piece import piece_mask
from transformerfam.rivals import RivalConfig
from transformerfam.rivals import attach as attach_rival

CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_conversion_keeps_class_weights_and_signature() -> None:
    """Catches a wrapper where users were promised their own model."""
    model = make_tiny_llama()
    weights = {name: value.clone() for name, value in model.named_parameters()}
    signature = inspect.signature(model.get_decoder().forward)
    converted = convert(model, CONFIG)
    assert converted is model
    assert isinstance(model, LlamaForCausalLM)
    assert inspect.signature(model.get_decoder().forward) == signature
    for name, value in model.named_parameters():
        assert name == "model.fam.prompt" or torch.equal(value, weights[name])


def test_prompt_is_the_only_new_parameter() -> None:
    """Catches parameters beyond the paper's F x hidden_size, or F x hidden_size x layers for the prefix."""
    assert [tuple(p.shape) for p in fam_parameters(convert(make_tiny_llama(), CONFIG))] == [(3, 32)]
    prefix = convert(make_tiny_llama(), CONFIG.replace(fam_init="prefix"))
    assert [tuple(p.shape) for p in fam_parameters(prefix)] == [(2, 3, 32)]
    assert fam_parameters(convert(make_tiny_llama(), CONFIG.replace(fam_length=0))) == []


@torch.no_grad()
def test_copy_of_a_converted_model_reads_on_its_own() -> None:
    """Catches hooks and methods of a copy that still act on the original."""
    model = convert(make_tiny_llama(), CONFIG)
    ids = random_ids(1, 20)
    expected = model(input_ids=ids).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(input_ids=ids).logits, expected)
    assert twin.read(ids).num_tokens_read == 20


@torch.no_grad()
def test_closed_key_bias_gives_bswa() -> None:
    """Catches a bias that tokens do not feel, or that the FAM's own update feels."""
    ids = random_ids(1, 40)
    model = convert(make_tiny_llama(), CONFIG)
    open_logits = model(input_ids=ids).logits
    set_key_bias(model, -1e4)
    assert model.fam_config.fam_key_bias == -1e4
    bswa = convert(make_tiny_llama(), CONFIG.replace(fam_length=0))(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, bswa, atol=1e-5, rtol=0)
    assert not torch.allclose(open_logits, bswa, atol=1e-3)


@torch.no_grad()
def test_embeddings_serve_instead_of_ids_and_labels_give_a_loss() -> None:
    """Catches doors of the base model that conversion shuts."""
    model, ids = convert(make_tiny_llama(), CONFIG), random_ids(2, 20)
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, output.logits)
    assert output.loss.isfinite()
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 20, 32)] * 3
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=3).logits, output.logits[:, -3:])


@torch.no_grad()
def test_eager_and_sdpa_agree() -> None:
    model, ids = convert(make_tiny_llama(), CONFIG), random_ids(1, 30)
    expected = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    piece_mask.cache_clear()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


def test_encoder_is_refused() -> None:
    encoder = BertLMHeadModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(UnsupportedModelError, match="rotary position embedding|is an encoder"):
        convert(encoder, CONFIG)


def test_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, vocab_size=50))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        convert(model, CONFIG)


def test_model_without_rope_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel has no rotary position embedding"):
        convert(model, CONFIG)


def test_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model is a Linear"):
        convert(torch.nn.Linear(2, 2), CONFIG)  # type: ignore[arg-type]


def test_length_dependent_rope_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="'dynamic' changes with the length"):
        convert(LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)), CONFIG)


def test_unknown_attention_back_end_is_refused() -> None:
    model = make_tiny_llama()
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(UnsupportedModelError, match="'paged|sdpa', required is one of eager, sdpa"):
        convert(model, CONFIG)


def test_weights_of_types_that_do_not_go_together_are_refused() -> None:
    """Catches torch's own complaint about matrices, which says nothing of the model."""
    model = make_tiny_llama()
    model.model.layers[1].to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="has weights of types bfloat16 and float32 and cannot run"):
        convert(model, CONFIG)
    assert not hasattr(model, "init_state")


def test_layer_out_of_range_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="fam_layers names layer 5, the model has layers 0 to 1"):
        convert(make_tiny_llama(), CONFIG.replace(fam_layers=(0, 5)))


def test_second_conversion_is_refused() -> None:
    model = convert(make_tiny_llama(), CONFIG)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        convert(model, CONFIG)


def refuse_and_compare(match: str) -> None:
    """Convert, expect the named seam to be refused, and see that the model is as it was."""
    model, ids = make_tiny_llama(), random_ids(1, 12)
    expected = model(ids).logits
    with pytest.raises(UnsupportedModelError, match=match):
        convert(model, CONFIG)
    assert torch.equal(model(ids).logits, expected)
    assert not hasattr(model, "read")
    assert [name for name, _ in model.named_parameters() if "fam" in name] == []


def test_wrong_turning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that passes a family with another RoPE layout."""
    turn = Turner.turn
    monkeypatch.setattr(Turner, "turn", lambda self, key, value, distance: turn(self, key, value, 2 * distance))
    refuse_and_compare("the position seam does not fit this model: what layer 0 keeps does not turn")


def test_layer_that_ignores_its_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that passes a family which changed how it calls its cache."""
    forward = modeling_llama.LlamaAttention.forward

    def without_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs | {"attention_mask": None} | as_cache(None))

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", without_cache)
    refuse_and_compare("the cache seam")


def test_family_with_another_residual_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that passes a family which adds its residual elsewhere."""
    forward = modeling_llama.LlamaDecoderLayer.forward

    def twice_residual(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = 2 * hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    assert inspect.signature(forward).parameters["hidden_states"]
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", twice_residual)
    refuse_and_compare("the first residual seam")


def test_unconverted_model_says_what_to_do() -> None:
    with pytest.raises(TransformerFamError, match=r"no memory yet; call convert"):
        memory_of(make_tiny_llama())


def test_assigned_configuration_is_refused() -> None:
    """Would catch a model that shows one configuration and reads with another."""
    model = convert(make_tiny_llama(), CONFIG)
    model.fam_config = CONFIG.replace(fam_key_bias=-1.0)
    for use in (lambda: model.read(random_ids(1, 12)), lambda: model(random_ids(1, 12)), model.init_state):
        with pytest.raises(TransformerFamError, match="model.fam_config was assigned"):
            use()
    rival: Any = attach_rival(make_tiny_llama(), RivalConfig(system="rmt", block_size=8))
    rival.rival_config = RivalConfig(system="rmt", block_size=9)
    with pytest.raises(TransformerFamError, match="model.rival_config was assigned"):
        rival(random_ids(1, 12))


def test_bad_input_is_refused() -> None:
    model = convert(make_tiny_llama(), CONFIG)
    with pytest.raises(TransformerFamError, match="input is empty"):
        model.read([])
    with pytest.raises(TransformerFamError, match="token id 61 is out of range, required is 0 to 60"):
        model.read([3, 61])
    with pytest.raises(TransformerFamError, match="token id -2 is out of range"):
        model(input_ids=torch.tensor([[-2]]))
    with pytest.raises(TransformerFamError, match="attention_mask has shape"):
        model(input_ids=random_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(TransformerFamError, match="output_attentions is not available"):
        model(input_ids=random_ids(1, 4), output_attentions=True)
    with pytest.raises(TransformerFamError, match="exactly one of input_ids and inputs_embeds"):
        model.get_decoder()()


def test_interrupted_read_keeps_what_was_read() -> None:
    """Catches a Ctrl-C that loses the reading, or leaves a state that continues differently."""
    model, ids = convert(make_tiny_llama(), CONFIG), random_ids(1, 50)

    def interrupt(done: int, total: int, state: Any) -> None:
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(
        ReadInterrupted, match=r"after 24 tokens; resume with model.read\(input_ids\[..., 24:\]"
    ) as caught:
        model.read(ids, progress=interrupt)
    error = caught.value
    state = model.read(ids[:, error.num_tokens_done :], error.state)
    assert torch.equal(state.fams, model.read(ids).fams)


def test_interrupt_within_a_piece_leaves_the_state_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers that are one block ahead of others after Ctrl-C in the middle of a forward."""
    model, ids = convert(make_tiny_llama(), CONFIG), random_ids(1, 50)
    expected = model.read(ids).fams
    mlp = model.model.layers[1].mlp
    forward, calls = mlp.forward, []

    def interrupt_once(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", interrupt_once)
    with pytest.raises(ReadInterrupted) as caught:
        model.read(ids)
    state = model.read(ids[:, caught.value.num_tokens_done :], caught.value.state)
    assert torch.equal(state.fams, expected)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_rounding_of_half_precision_is_no_reason_to_refuse(case: str, dtype: torch.dtype) -> None:
    """Catches checks that compare after a choice of experts, which rounding turns: 1 in 4 of these were refused."""
    for seed in range(6):
        model = make_tiny(case)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2, generator=generator)
        convert(model.to(dtype), FamConfig(block_size=8, fam_length=3))


def test_conversion_under_autocast_is_that_without() -> None:
    """Catches checks that run in autocast's type and are held to the model's."""
    for attach_memory in (
        lambda model: convert(model, FamConfig(block_size=8, fam_length=3)),
        lambda model: attach_rival(model, RivalConfig(system="rmt", block_size=8)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            attach_memory(make_tiny("llama"))


def test_seam_that_does_not_fit_in_half_precision_is_not_the_versions_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a message that blames transformers' version for what may be rounding."""
    monkeypatch.setattr("transformerfam.decoder.layouts.own_windows", lambda config: [None, 4000, 4000])
    model = make_tiny("gemma2", sliding_window=4000).to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"the cache seam .* in torch.bfloat16; convert it in float32"):
        convert(model, FamConfig(block_size=8, fam_length=3))


def test_positions_that_a_model_was_not_trained_on_are_said() -> None:
    """Catches the README's block of 1,024 and three memory segments on a model of 2,048 positions."""
    fits = FamConfig(block_size=128, fam_length=4, num_memory_segments=3)
    model = convert(make_tiny("llama"), fits)  # a warning would be an error
    with pytest.warns(UserWarning, match="reaches position 531, and the model was trained on positions up to 511"):
        convert(make_tiny("llama"), fits.replace(block_size=133))
    with pytest.warns(UserWarning, match=r"max_position_embeddings.*smaller block_size, or fewer num_memory_segments"):
        set_block_size(model, 133)
    with pytest.warns(UserWarning, match="reaches position 599"):
        attach_rival(make_tiny("llama"), RivalConfig(system="rmt", block_size=600))


def test_texts_that_outgrow_positions_are_said_once() -> None:
    """Catches full attention, and FAM rows at position 0, far beyond what a model was trained on without a word."""
    small = FamConfig(block_size=16, fam_length=2, num_memory_segments=1, fam_position="zero")
    rival = attach_rival(make_tiny("llama"), RivalConfig(system="full", block_size=32))
    for model, options in ((rival, {}), (convert(make_tiny("llama"), small), {"position_offset": 8})):
        state = model.init_state(**options)
        model.read(random_ids(1, 504), state)
        with pytest.warns(UserWarning, match=r"has come to position 5(12|19), .* up to 511 .*the text.s beginning"):
            model.read(random_ids(1, 9), state)
        model.read(random_ids(1, 9), state)  # a second warning would be an error
    with pytest.warns(UserWarning, match="the text has come to position 5,000"):
        model.read(random_ids(1, 1), model.init_state(position_offset=5000))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fam_length", [0, 2])
def test_model_that_is_cast_after_conversion_reads_as_one_cast_before(dtype: torch.dtype, fam_length: int) -> None:
    """Catches keys turned by exact angles in a model whose own table `to(dtype)` has rounded."""
    shape = SHAPE | {"hidden_size": 128, "num_attention_heads": 2, "max_position_embeddings": 8192}

    def make() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1)).eval()

    config = FamConfig(block_size=256, fam_length=fam_length, num_memory_segments=3, fam_key_bias=0.0)
    ids = random_ids(1, 1200)
    cast, expected = convert(make(), config).to(dtype), convert(make().to(dtype), config)
    for rows, same in zip(fam_parameters(expected), fam_parameters(cast), strict=True):
        rows.copy_(same)  # the mean embedding of rounded weights is another one
    assert torch.equal(cast(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_window_that_the_class_ignores_is_named() -> None:
    """Catches a refusal that leaves the user alone with a relative error."""
    config = make_tiny_llama().config
    config.sliding_window = 4096
    with pytest.raises(UnsupportedModelError, match="has sliding_window=4096, by which keys are masked here"):
        convert(LlamaForCausalLM(config), CONFIG)


def test_positions_by_which_queries_are_scaled_are_warned_of() -> None:
    """Catches tokens at the beginning of a text that are scaled as if they were far in it."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "llama_4_scaling_beta": 0.5,
    }
    with pytest.warns(UserWarning, match="reaches position 19, and from 16 on the model scales its queries"):
        convert(make_tiny("ministral3", rope_parameters=rope), CONFIG.replace(fam_length=0, block_size=10))
    convert(make_tiny("ministral3", rope_parameters=rope), CONFIG.replace(fam_length=0))


def test_family_whose_attention_names_its_mask_otherwise_gets_the_true_reason() -> None:
    """Catches a check that fails by its own signature."""
    shape = SHAPE | {"num_hidden_layers": 3, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = AfmoeConfig(**shape, moe_intermediate_size=16, num_dense_layers=1, sliding_window=6)
    with pytest.raises(UnsupportedModelError, match="as Llama's they fail: the .* seam does not fit this model"):
        convert(AfmoeForCausalLM(config).eval(), CONFIG)
