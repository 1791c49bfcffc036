"""PEFT's own calls on a converted model: LoRA, DoRA, prompt alone; load, switch, merge; and a FAM trained alone."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file
from tiny_llama import make_tiny_llama, random_ids, random_rows
from tiny_models import save_passkey_model

from transformerfam import FamConfig, FamState, convert, from_pretrained
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError, UnsupportedModelError
from transformerfam.fam.convert import fam_parameters, memory_of, personal_memory, set_block_size
from transformerfam.rivals import RivalConfig, attach
from transformerfam.weights.adapter import FamAdapter, inject_lora
from transformerfam.weights.models import load_base, load_model, load_tokenizer
from transformerfam.weights.peft_adapters import has_adapters, load_peft_folder, merge_lora

CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True},
}
IDS = random_ids(2, 30)


def make_peft_model(kind: str, seed: int = 0) -> Any:
    """Wrap a converted model by PEFT, the initial FAM trained and saved with the adapters, and train it a little."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, modules_to_save=["fam"], init_lora_weights=False, **KINDS[kind])
    model = peft.get_peft_model(convert(make_tiny_llama(), CONFIG), config)
    train(model, [p for p in model.parameters() if p.requires_grad])
    return model


def train(model: Any, parameters: list[Any]) -> list[float]:
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_and_prompt_are_trained_saved_loaded_and_merged(kind: str, tmp_path: Path) -> None:
    """Catches a prompt that PEFT freezes, forgets or copies together with a whole model."""
    model = make_peft_model(kind)
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    prompt = "base_model.model.model.fam.modules_to_save.default.prompt"
    assert [name for name in trained if "lora_" not in name] == [prompt]
    assert len(trained) > 2
    untrained = logits_of(convert(make_tiny_llama(), CONFIG))
    found = logits_of(model)
    assert not torch.allclose(found, untrained, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), untrained)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(convert(make_tiny_llama(), CONFIG), tmp_path)
    assert torch.equal(logits_of(loaded), found)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(make_tiny_llama())
    torch.testing.assert_close(logits_of(merged), found, atol=1e-4, rtol=1e-4)
    assert torch.equal(fam_parameters(merged)[0], fam_parameters(model)[0])


def test_adapters_are_switched_with_their_prompts(tmp_path: Path) -> None:
    """Catches one adapter's LoRA with another's prompt."""
    models = {name: make_peft_model("lora", seed) for seed, name in enumerate(("one", "two"))}
    expected = {name: logits_of(model) for name, model in models.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    both = peft.PeftModel.from_pretrained(convert(make_tiny_llama(), CONFIG), tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("two", "one", "two"):
        both.set_adapter(name)
        assert torch.equal(logits_of(both), expected[name]), name
        assert torch.equal(fam_parameters(both)[0], fam_parameters(models[name])[0])


def test_wrapped_model_reads_generates_and_keeps_states(tmp_path: Path) -> None:
    """Catches methods and settings that stay with the model inside, and states that are taken for another model's."""
    model = make_peft_model("lora")
    state = model.read(IDS[:1])
    answer = model.generate(input_ids=IDS[:1, :4], past_key_values=state.fork(), max_new_tokens=9, do_sample=False)
    state.save(tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(convert(make_tiny_llama(), CONFIG), tmp_path / "adapter")
    loaded = FamState.load(tmp_path / "state.safetensors", again)  # a warning would be an error
    assert torch.equal(
        again.generate(input_ids=IDS[:1, :4], past_key_values=loaded, max_new_tokens=9, do_sample=False), answer
    )
    set_block_size(model, 5)
    assert memory_of(model).config.block_size == model.init_state().config.block_size == 5


def test_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    make_peft_model("lora").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(convert(make_tiny_llama(num_key_value_heads=4), CONFIG), tmp_path)


def test_prompt_alone_is_trained() -> None:
    """Catches a frozen base that moves, and a prompt that learns nothing."""
    model = convert(make_tiny_llama(), CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(False)
    prompt = fam_parameters(model)[0].requires_grad_(True)
    losses = train(model, [prompt])
    assert losses[-1] < losses[0]
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.fam.prompt"]


def test_personal_memory_starts_from_a_saved_fam_and_is_trained_alone(tmp_path: Path) -> None:
    """Catches a saved FAM whose residual is left out, or a prefix that a loaded model does not start from."""
    model: Any = convert(make_tiny_llama(), CONFIG)
    read = model.read(IDS[:1])
    state = model.init_state(2, fam=read.fams[:, 0])
    expected = model(input_ids=IDS, past_key_values=state).logits.detach()
    parameters = personal_memory(model, read.fams[:, 0])
    assert [tuple(p.shape) for p in parameters] == [(2, 3, 32)]
    torch.testing.assert_close(logits_of(model), expected)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if ".fam." not in name}
    losses = train(model, parameters)
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in base.items())
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(TransformerFamError, match=r"has shape \(2, 4, 32\), required is"):
        personal_memory(convert(make_tiny_llama(), CONFIG), random_rows(2, 4, 32))


def peft_model(adapter_name: str = "default", **fields: Any) -> Any:
    torch.manual_seed(1)
    options = {"r": 4, "modules_to_save": ["fam"], "init_lora_weights": False, "target_modules": ["q_proj"]}
    model = convert(make_tiny_llama(), CONFIG)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options | fields), adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(random_rows(*parameter.shape))
    return wrapped.eval()


WRAPPED: dict[str, dict[str, Any]] = {
    "another name": {"adapter_name": "mine"},
    "no prompt": {"modules_to_save": None},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings and head in full": {"modules_to_save": ["fam", "embed_tokens", "lm_head"]},
    "single tokens": {"trainable_token_indices": [1, 2]},
    "dora": {"use_dora": True, "adapter_name": "mine"},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", WRAPPED)
def test_adapter_of_a_wrapped_model_is_taken_off_and_applied(name: str, merge: bool, tmp_path: Path) -> None:
    """Catches an adapter of another name, and parts of it that are not LoRA on linear layers."""
    model = peft_model(**WRAPPED[name])
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    model.read(IDS).save(tmp_path / "state")
    applied = FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(), merge=merge)  # a warning would be an error
    torch.testing.assert_close(logits_of(applied), logits_of(model), atol=1e-4, rtol=1e-4)
    assert FamState.load(tmp_path / "state", applied).num_tokens_read == 30
    assert any("lora" in key for key, _ in applied.named_parameters()) != merge


def test_adapter_in_force_is_taken_off_and_several_are_refused(tmp_path: Path) -> None:
    """Catches the first of several adapters, or all of them, taken for the one that the model runs with."""
    model = peft_model("one")
    torch.manual_seed(2)
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    for name in ("two", "one"):
        model.set_adapter(name)
        FamAdapter.from_model(model).save_pretrained(tmp_path / name)
        applied = FamAdapter.from_pretrained(tmp_path / name).apply(make_tiny_llama())
        torch.testing.assert_close(logits_of(applied), logits_of(model))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(TransformerFamError, match="required is one; choose it with set_adapter"):
        FamAdapter.from_model(model)


def test_model_with_adapted_embeddings_is_converted() -> None:
    """Catches embeddings inside of PEFT's layers, which have no number of rows by transformers' name."""
    for fields in ({"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [1]}):
        model = make_tiny_llama()
        peft.inject_adapter_in_model(peft.LoraConfig(**{"target_modules": ["q_proj"]} | fields), model)
        assert convert(model, CONFIG).read(IDS).num_tokens_read == 30


@pytest.mark.parametrize("merge", [False, True])
def test_folder_of_peft_is_loaded_with_its_base(merge: bool, tmp_path: Path) -> None:
    """Catches a folder that PEFT wrote and nothing here reads: `load_model`, `fam`, and the harness's `peft`."""
    save_passkey_model(tmp_path / "base")
    base, _ = load_model(tmp_path / "base")
    torch.manual_seed(1)
    options = {"modules_to_save": ["fam"], "init_lora_weights": False, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(tmp_path / "adapter", merge=merge)
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    harness = pytest.importorskip("transformerfam.tools.lm_eval")
    lm = harness.FamLM(str(tmp_path / "base"), peft=str(tmp_path / "adapter"))
    torch.testing.assert_close(lm.model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    for system in ("bswa", "fam_untrained"):  # as of the base, whose weights they have
        pair = [load_model(tmp_path / name, system)[0] for name in ("adapter", "base")]
        torch.testing.assert_close(*(one(input_ids=ids).logits for one in pair))
    with pytest.raises(StateMismatchError, match="does not fit this model"):
        load_peft_folder(convert(make_tiny_llama(), CONFIG), tmp_path / "adapter", merge)
    with pytest.raises(CorruptFileError, match=r"holds no PEFT adapter \(adapter_config.json is missing\)"):
        load_peft_folder(base, tmp_path / "base", merge)


def test_adapter_of_a_plain_model_is_taken_wherever_a_model_is(tmp_path: Path) -> None:
    """Catches a fine-tuned model that is converted, planned or read without its adapter, or refused."""
    save_passkey_model(tmp_path / "converted")
    base, tokenizer = load_base(tmp_path / "converted")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"])).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    plain, _ = load_base(tmp_path / "adapter")
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert not has_adapters(plain)
    assert len(load_tokenizer(tmp_path / "adapter")) == len(tokenizer)
    window, _ = load_model(tmp_path / "adapter", "bswa", {"block_size": 32, "fam_length": 2})
    torch.testing.assert_close(window(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    run("convert", tmp_path / "adapter", tmp_path / "new", "--set", "block_size=32", "--set", "fam_length=2")
    new, _ = load_base(tmp_path / "new")
    torch.testing.assert_close(new(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    planned = [
        run("plan", tmp_path / name, "--train", "none").partition("parameters")[2] for name in ("base", "adapter")
    ]
    assert planned[0] == planned[1]
    with pytest.raises(TransformerFamError, match="has no trained memory"):
        load_model(tmp_path / "adapter")


SOFT_PROMPTS: dict[str, Any] = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "adaption prompt": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", SOFT_PROMPTS)
def test_adapter_outside_of_the_layers_is_refused(kind: str, merge: bool, tmp_path: Path) -> None:
    """Catches soft prompts that are dropped: the model then answers as if it had never been adapted."""
    wrapped: Any = peft.get_peft_model(make_tiny_llama(), SOFT_PROMPTS[kind])
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="of PEFT's type .*, which does not act through the model's layers"):
        load_peft_folder(convert(make_tiny_llama(), CONFIG), tmp_path, merge)


def test_adapter_that_would_be_dropped_is_not_taken_off() -> None:
    """Catches a memory saved without the soft prompt or the other adapter that its model runs with."""
    prompted: Any = peft.get_peft_model(convert(make_tiny_llama(), CONFIG), SOFT_PROMPTS["prompt tuning"])
    with pytest.raises(UnsupportedModelError, match="the adapter 'default' is of PEFT's type PROMPT_TUNING"):
        FamAdapter.from_model(prompted)
    other: Any = peft.get_peft_model(
        convert(make_tiny_llama(), CONFIG), peft.LoHaConfig(r=2, target_modules=["q_proj"])
    )
    with pytest.raises(UnsupportedModelError, match="is of PEFT's type LOHA, required is LORA; save it with PEFT's"):
        FamAdapter.from_model(other)


def test_ways_of_peft_that_do_not_fit_a_memory_are_refused_by_name() -> None:
    """Catches a traceback of PEFT's, and an adapter per row with an initial FAM of one of them."""
    adapted: Any = peft.get_peft_model(convert(make_tiny_llama(), CONFIG), SOFT_PROMPTS["adaption prompt"])
    with pytest.raises(UnsupportedModelError, match="attention of layer 1 is a AdaptedAttention now"):
        logits_of(adapted)
    with pytest.raises(TransformerFamError, match="an adapter is named 'prompt', as a parameter of the memory is"):
        logits_of(peft_model("prompt"))
    assert logits_of(peft_model("prefix")).shape == (2, 30, 61)
    model = peft_model("one")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.eval()
    for given in ({}, {"past_key_values": model.init_state(2)}):
        with pytest.raises(TransformerFamError, match=r"adapter_names is \['one', 'two'\], required is one adapter"):
            model(input_ids=IDS, adapter_names=["one", "two"], **given)
    with pytest.raises(TransformerFamError, match=r"adapter_names is \['one', 'two'\], required is one adapter"):
        model.generate(input_ids=IDS, adapter_names=["one", "two"], max_new_tokens=2)


@pytest.mark.parametrize(("change", "match"), [("less", "it lacks .*lora_A"), ("more", "it holds .*lora_C")])
def test_adapter_with_other_tensors_than_its_layers_is_refused(change: str, match: str, tmp_path: Path) -> None:
    """Catches LoRA that is left as it was drawn, of which PEFT only warns."""
    make_peft_model("lora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(name for name in tensors if "lora_A" in name)
    if change == "less":
        del tensors[name]
    else:
        tensors[name.replace("lora_A", "lora_C")] = tensors[name].clone()
    save_file(tensors, path)
    with pytest.raises(StateMismatchError, match=match):
        load_peft_folder(convert(make_tiny_llama(), CONFIG), tmp_path, merge=False)


def test_reading_asks_by_the_adapter_in_force() -> None:
    """Catches constant queries that a reading keeps from another adapter, or from weights of before training."""
    config = CONFIG.replace(fam_query="initial", fam_residual="none")
    lora = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model: Any = peft.get_peft_model(convert(make_tiny_llama(), config), peft.LoraConfig(**lora), "one").eval()
    model.add_adapter("two", peft.LoraConfig(**lora))
    inner = model.base_model.model

    def changes(state: FamState) -> torch.Tensor:
        """Return what queries of before a change would make of a text, less what own ones do."""
        fresh = inner.init_state(2)
        for layer, own in zip(state.layers, fresh.layers, strict=True):
            own.keys, own.values, own.fam = layer.keys.clone(), layer.values.clone(), layer.fam.clone()
        fresh.block_fill, fresh.num_blocks_per_row = list(state.block_fill), list(state.num_blocks_per_row)
        logits = [model(input_ids=IDS[:, :20], past_key_values=one).logits for one in (state, fresh)]
        return (logits[0] - logits[1]).abs().max()

    with torch.no_grad():
        model.set_adapter("one")
        state = inner.read(IDS)
        model.set_adapter("two")
        assert changes(state.fork()) < 1e-5
        with model.disable_adapter():
            assert changes(state.fork()) < 1e-5
        inner.model.layers[0].self_attn.q_proj.base_layer.weight.mul_(3)
        assert changes(state.fork()) < 1e-5


def test_reading_that_goes_on_with_other_weights_warns_once() -> None:
    """Catches a live state that another model continues without a word."""
    state = convert(make_tiny_llama(), CONFIG).read(IDS)
    other = convert(make_tiny_llama(seed=4), CONFIG)
    with pytest.warns(UserWarning, match="the state was made on other base weights"):
        other(input_ids=IDS, past_key_values=state)
    other(input_ids=IDS, past_key_values=state)  # a second warning would be an error


@torch.no_grad()
def test_saved_reading_names_the_weights_that_read(tmp_path: Path) -> None:
    """Catches a state that names what is in force when it is saved: another adapter, or weights trained since."""
    for seed, name in enumerate(("one", "two")):
        with torch.enable_grad():
            make_peft_model("lora", seed).save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(convert(make_tiny_llama(), CONFIG), tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    path = tmp_path / "state.safetensors"

    def save_and_load(state: FamState, adapter: str) -> FamState:
        state.save(path)
        model.set_adapter(adapter)
        return FamState.load(path, model)  # a warning would be an error

    model.set_adapter("one")
    state = model.read(IDS)
    kept = pickle.dumps(state)
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="memory weights"):
        model.read(IDS, pickle.loads(kept))  # noqa: S301
    loaded = save_and_load(state, "one")  # though two was in force
    model.set_adapter("two")
    with pytest.warns(UserWarning, match="memory weights"):
        FamState.load(path, model)
    model.read(IDS, loaded)
    for adapter in ("one", "two"):  # both read
        with pytest.warns(UserWarning, match="memory weights .* .several, one after the other there"):
            again = save_and_load(loaded, adapter)
    again.save(path)
    with pytest.warns(UserWarning, match="memory weights .* .several"):  # loading does not make it of one
        FamState.load(path, model)
    model.set_adapter("one")
    model.read(IDS).save(path)
    with model.disable_adapter(), pytest.warns(UserWarning, match="memory weights"):
        FamState.load(path, model)
    with model.disable_adapter():
        model.read(IDS).save(path)
        FamState.load(path, model)
    with pytest.warns(UserWarning, match="memory weights"):
        FamState.load(path, model)

    plain: Any = convert(make_tiny_llama(), CONFIG)
    state = plain.read(IDS)
    plain.model.layers[0].mlp.up_proj.weight.add_(0.5)
    state.save(path)
    with pytest.warns(UserWarning, match="other base weights .several"):
        FamState.load(path, plain)
    state = plain.read(IDS)
    inject_lora(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merge_lora(plain)
    plain.read(IDS, plain.read(IDS)).save(path)
    FamState.load(path, plain)


@pytest.mark.parametrize("change", ["merged", "type"])
def test_digest_that_was_kept_is_that_of_the_weights_until_they_are_trained(change: str) -> None:
    """Catches a merged model that is trained on, and whose states load elsewhere without a word."""
    model: Any = convert(make_tiny_llama(), CONFIG)
    identity = memory_of(model).identity
    assert identity is not None
    before = identity.base_digest()
    if change == "merged":
        inject_lora(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        merge_lora(model)
    else:
        hold_weights_in("bfloat16", model)
    twin = copy.deepcopy(model)
    assert identity.base_digest() == before == memory_of(twin).identity.base_digest()  # type: ignore[union-attr]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    assert identity.base_digest() != before
    assert memory_of(twin).identity.base_digest() == before  # type: ignore[union-attr]


@pytest.mark.parametrize("system", ["fam", "bswa", "rmt"])
def test_adapter_that_acts_from_a_place_on_is_refused_by_name(system: str) -> None:
    """Catches activated LoRA, whose place is counted in the whole call, on the last tokens of every piece."""
    model: Any = make_tiny_llama()
    if system == "rmt":
        attach(model, RivalConfig(system="rmt", block_size=8))
    else:
        convert(model, CONFIG if system == "fam" else CONFIG.without_fam())
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[60, 59])
    adapted: Any = peft.get_peft_model(model, lora).eval()
    match = r"adapter 'default' has alora_invocation_tokens=\[60, 59\], from which on it acts"
    with pytest.raises(TransformerFamError, match=match):
        logits_of(adapted)
    with pytest.raises(TransformerFamError, match=match):
        adapted.generate(input_ids=IDS, max_new_tokens=2)
    with pytest.raises(TransformerFamError, match=match):
        model.read(IDS)


@pytest.mark.parametrize("system", ["fam", "rmt"])
def test_layers_that_are_not_those_of_the_conversion_are_refused(system: str) -> None:
    """Catches PEFT's copies of layers, which the memory does not see."""
    model: Any = make_tiny_llama()
    if system == "rmt":
        attach(model, RivalConfig(system="rmt", block_size=8))
    else:
        convert(model, CONFIG)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(UnsupportedModelError, match="the model has 4 layers now and was converted with 2; change"):
        logits_of(peft.get_peft_model(model, lora))


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of the bias, in its words
def test_lora_with_a_bias_is_loaded_apart_where_its_layer_has_none(tmp_path: Path) -> None:
    """Catches a memory that cannot be loaded, since its LoRA cannot be merged."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    model: Any = peft.get_peft_model(convert(make_tiny_llama(), CONFIG), lora)
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    loaded = FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(), merge=True)
    assert torch.equal(logits_of(loaded), logits_of(model))
    model.save_pretrained(tmp_path / "peft")
    loaded = load_peft_folder(convert(make_tiny_llama(), CONFIG), tmp_path / "peft", merge=True)
    assert torch.equal(logits_of(loaded), logits_of(model))
