"""Models and states on their way elsewhere: resized, pickled, copied, out of inference mode, offloaded."""

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tiny_families import make_tiny
from tiny_llama import make_tiny_llama, random_ids
from tiny_models import make_passkey_model

from transformerfam import FamConfig, FamState, convert, from_pretrained
from transformerfam.config import UPDATE_PRESETS
from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.fam.compiled import compile_decoding
from transformerfam.rivals import RIVAL_NAMES, RivalConfig, attach
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model, save_model

IDS = random_ids(2, 21)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def make(preset: str = "paper", seed: int = 0) -> Any:
    shape = {"fam_key_bias": 0.0, "block_size": 8, "fam_length": 3, "num_memory_segments": 1}
    return convert(make_tiny_llama(seed=seed), FamConfig.preset(preset, **shape))


def make_rival(system: str) -> Any:
    return attach(make_tiny_llama(), RivalConfig(system=system, block_size=8))


MODELS = {preset: (make, preset) for preset in UPDATE_PRESETS} | {name: (make_rival, name) for name in RIVAL_NAMES}
every_model = pytest.mark.parametrize("name", MODELS)


def logits_of(model: Any, state: Any = None, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=state).logits


def test_resized_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """Catches a size of the vocabulary that is kept from the conversion on."""
    model = make()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(model))
    model.read(IDS).save(tmp_path / "state")
    assert FamState.load(tmp_path / "state", loaded).num_tokens_read == 21  # a warning would be an error
    model, tokenizer = make_passkey_model()
    tokenizer.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, tmp_path / "ours")
    ids = torch.arange(len(tokenizer) - 9, len(tokenizer))[None]
    assert torch.equal(logits_of(load_model(tmp_path / "ours")[0], ids=ids), logits_of(model, ids=ids))


@every_model
def test_model_comes_out_of_a_pickle_as_it_went_in(name: str, tmp_path: Path) -> None:
    """Catches methods that are not there yet when a pickle looks them up: `torch.save(model)`, and its load."""
    build, argument = MODELS[name]
    model = build(argument)
    torch.save(model, tmp_path / "model.pt")
    for twin in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert torch.equal(logits_of(twin), logits_of(model))
        assert torch.equal(twin.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
        twin.get_input_embeddings().weight.data.zero_()
        assert not torch.equal(logits_of(twin), logits_of(model))


@pytest.mark.parametrize("case", ["gemma2", "falcon", "deepseek_v3"])
def test_model_of_another_family_comes_out_of_a_pickle(case: str) -> None:
    model = convert(make_tiny(case), FamConfig(block_size=8, fam_length=3, fam_key_bias=0.0))
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), logits_of(model))  # noqa: S301


@every_model
def test_state_comes_out_of_a_pickle_without_its_model(name: str) -> None:
    """Catches a state that takes its model along, and one that continues with any model."""
    build, argument = MODELS[name]
    model = build(argument)
    state = model.read(IDS)
    packed = pickle.dumps(state)
    assert len(packed) < 4 * state.num_bytes + 30_000
    assert model.get_input_embeddings().weight.numpy(force=True).tobytes()[:64] not in packed
    loaded = pickle.loads(packed)  # noqa: S301
    assert loaded.row_lengths == state.row_lengths
    for twin in (loaded, copy.deepcopy(state)):
        assert torch.equal(logits_of(model, twin), logits_of(model, state.fork()))
    fresh = pickle.loads(packed)  # noqa: S301
    with pytest.raises(StateMismatchError, match="out of a pickle and has no model yet"):
        _ = fresh.identity.model


def test_state_out_of_a_pickle_is_compared_with_the_model_that_goes_on() -> None:
    packed = pickle.dumps(make().read(IDS))
    with pytest.warns(UserWarning, match="the state was made on other base weights"):
        make(seed=5).read(IDS, pickle.loads(packed))  # noqa: S301
    other = convert(make_tiny_llama(3), make().fam_config)
    with pytest.raises(StateMismatchError, match="the state was made on another architecture"):
        other.read(IDS, pickle.loads(packed))  # noqa: S301


def test_copy_of_a_compiled_model_is_not_compiled() -> None:
    """Catches a graph, which no pickle takes, that keeps a model from being saved."""
    model = make()
    compile_decoding(model, backend="eager")
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert twin.get_decoder().fam.compiled_steps == []
    assert len(model.get_decoder().fam.compiled_steps) == 1


@every_model
def test_state_of_inference_mode_goes_on_outside(name: str) -> None:
    """Catches tensors that can be written, or kept for a gradient, inside of inference mode alone."""
    build, argument = MODELS[name]
    model = build(argument)
    expected = logits_of(model, model.read(IDS))
    with torch.inference_mode():
        state = model.read(IDS)
        state.fork()
        model.generate(IDS[:, :3], past_key_values=state.fork(), **GREEDY)
    assert torch.equal(logits_of(model, state.fork()), expected)
    model(input_ids=IDS, past_key_values=state.fork()).logits.sum().backward()
    assert model.generate(IDS[:, :3], past_key_values=state.fork(), **GREEDY).shape == (2, 7)
    if name != "full":
        for control in ("zero_memory", "swap_memory", "initial_memory"):
            model.read(IDS, getattr(state.fork(), control)())
            getattr(state.select([0, 1]), control)()
    with torch.inference_mode():
        model.read(IDS, state)


@every_model
def test_reading_on_leaves_a_loss_its_gradients(name: str) -> None:
    """Catches tensors that a graph needs, and that a reading without gradients writes over."""
    build, argument = MODELS[name]
    model = build(argument)

    def loss_and_state() -> tuple[torch.Tensor, Any]:
        output = model(input_ids=IDS, labels=IDS)
        return output.loss, output.past_key_values

    def gradients() -> list[torch.Tensor | None]:
        found = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        return found

    loss, state = loss_and_state()
    loss.backward()
    required = gradients()
    expected = logits_of(model, model.read(IDS))
    loss, state = loss_and_state()
    assert torch.allclose(logits_of(model, state.fork()), expected, atol=1e-5)
    model.read(IDS, state)
    loss.backward()
    for found, due in zip(gradients(), required, strict=True):
        assert (found is None) == (due is None)
        assert found is None or torch.equal(found, due)


PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")  # of transformers
@pytest.mark.parametrize("is_converted_first", [False, True])
def test_offloaded_layers_read_as_layers_at_hand(is_converted_first: bool, tmp_path: Path) -> None:
    """Catches hooks of accelerate and of conversion that do not go together."""
    config, expected = make().fam_config, logits_of(make())
    if is_converted_first:
        places = PLACES | {"model.fam": "cpu"}
        model: Any = accelerate.dispatch_model(make(), places, main_device="cpu", offload_dir=tmp_path)
    else:
        base = accelerate.dispatch_model(make_tiny_llama(), PLACES, main_device="cpu", offload_dir=tmp_path)
        model = convert(base, config)
    assert torch.equal(logits_of(model), expected)
    assert model.generate(IDS[:, :4], past_key_values=model.read(IDS), **GREEDY).shape == (2, 8)
    model.read(IDS).save(tmp_path / "state")
    FamState.load(tmp_path / "state", make())  # a warning of other weights would be an error
    FamAdapter.from_model(model).save_pretrained(tmp_path / "memory")
    assert torch.equal(logits_of(FamAdapter.from_pretrained(tmp_path / "memory").apply(make_tiny_llama())), expected)
    save_model(model, make_passkey_model()[1], tmp_path / "model")
    assert torch.equal(logits_of(load_model(tmp_path / "model")[0]), expected)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")  # of transformers
def test_converted_folder_is_loaded_with_offloaded_layers(tmp_path: Path) -> None:
    """Catches a model too large for the memory that can be converted, and cannot be loaded once it is."""
    make().save_pretrained(tmp_path)
    model: Any = from_pretrained(tmp_path, device_map=PLACES, offload_folder=tmp_path / "disk")
    assert model.lm_head.weight.device.type == "meta"
    assert torch.equal(logits_of(model.eval()), logits_of(make()))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(from_pretrained(tmp_path / "again").eval()), logits_of(make()))


def test_weight_that_nobody_holds_is_refused_by_name() -> None:
    """Catches an error about a meta tensor when the model's digest is made."""
    model = make()
    model.lm_head.to("meta")
    with pytest.raises(TransformerFamError, match="lm_head.weight is on device 'meta', as weights that accelerate"):
        FamAdapter.from_model(model)


def test_offloaded_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    """Catches an error about a meta tensor, of which no one knows where it comes from."""
    config = make().fam_config
    with pytest.raises(TransformerFamError, match="the embedding is on device 'meta'"):
        convert(accelerate.disk_offload(make_tiny_llama(), tmp_path), config)
    for offloaded in (accelerate.cpu_offload(make()), accelerate.disk_offload(make(), tmp_path)):
        with pytest.raises(TransformerFamError, match="is on device 'meta', as weights that accelerate offloads are"):
            offloaded.read(IDS)
