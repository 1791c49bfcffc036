"""transformers' own server: a converted model keeps its memory there, or is refused."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import transformerfam
from transformerfam.decoder.memory import memory_of
from transformerfam.errors import TransformerFamError
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_base, load_model

serving = pytest.importorskip("transformers.cli.serving.utils")  # older transformers have none
managers = pytest.importorskip("transformers.cli.serving.model_manager")

PROMPT = "The grass is green. The sky is blue. The pass key is 12345. Remember it."


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model as that server loads it, in a process where `install` was called."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"])
    transformerfam.install()
    return managers.ModelManager(device="cpu")._load_model(f"{folder}@main")


def test_converted_model_under_transformers_serve_keeps_its_memory(served: Any, folder: Path) -> None:
    """Catches a server that answers with the base model, or with a cache that is no state."""
    model, tokenizer = load_model(folder)
    assert memory_of(served).config == model.fam_config
    inputs = tokenizer(PROMPT, return_tensors="pt")
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2)
    manager = serving.GenerateManager()
    _, _, said = asyncio.run(manager.generate_non_streaming(served, tokenizer, inputs, config, "one"))
    with torch.no_grad():
        required = model.generate(**inputs, generation_config=config)[0, inputs.input_ids.shape[1] :]
    assert said.tolist() == required.tolist()
    base = load_base(folder)[0].generate(**inputs, generation_config=config)[0, inputs.input_ids.shape[1] :]
    assert said.tolist() != base.tolist()


def test_continuous_batching_and_a_static_cache_are_refused(served: Any, folder: Path) -> None:
    """Catches `transformers serve --continuous-batching`, `--compile` or `generate_batch` without the memory."""
    _, tokenizer = load_model(folder)
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0, eos_token_id=2)
    with pytest.raises(TransformerFamError, match=r"continuous batching \(generate_batch.* has a paged cache"):
        serving.CBGenerateManager().init_cb(served, config)
    with pytest.raises(TransformerFamError, match="continuous batching"):
        served.generate_batch([[5, 6, 7]], generation_config=config)
    config.cache_implementation = "static"
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with pytest.raises(TransformerFamError, match="cache_implementation is 'static', required is None"):
        asyncio.run(serving.GenerateManager().generate_non_streaming(served, tokenizer, inputs, config, "one"))


@pytest.mark.parametrize("name", ["shipped", "saved", "adapter"])
def test_without_the_package_a_converted_model_is_refused(name: str, tmp_path: Path, folder: Path) -> None:
    """Catches `transformers serve FOLDER`, without `install`, that answers with the base model and says nothing."""
    shipped = Path(transformerfam.__file__).parent / "data" / "tiny"
    source = {"shipped": shipped, "saved": folder, "adapter": tmp_path}[name]
    if name == "adapter":
        FamAdapter.from_model(load_model(folder)[0]).save_pretrained(tmp_path)
    kind, words = (ValueError, "Unrecognized model") if name == "adapter" else (AttributeError, "FamLlamaForCausalLM")
    with pytest.raises(kind, match=words):
        managers.ModelManager(device="cpu")._load_model(f"{source}@main")
