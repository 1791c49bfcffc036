"""`transformerfam.from_pretrained`: converted models in one call, and a transformers that stays as it is without it."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_tiny_llama, random_ids
from tiny_models import make_passkey_model, save_passkey_model
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, pipeline

import transformerfam
from transformerfam import AutoFamModelForCausalLM, FamConfig, convert
from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.fam.convert import memory_of
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import load_model, save_model

CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
IDS = random_ids(1, 30)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert(make_tiny_llama(), CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", PreTrainedModel.__dict__["from_pretrained"])
    transformerfam.install()
    transformerfam.install()
    yield
    monkeypatch.undo()
    assert not hasattr(PreTrainedModel.from_pretrained, "takes_memory")


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("value", [5, "five", None])
def test_configuration_in_two_files_is_one(value: Any, tmp_path: Path) -> None:
    """Catches a field that a user changes in `config.json`, and that is never read."""
    folder = tmp_path / "model"
    save_passkey_model(folder)
    values = json.loads((folder / "config.json").read_text())
    values["fam_config"] = values["fam_config"] | {"block_size": value} if value else 3
    (folder / "config.json").write_text(json.dumps(values))
    match = "has 5 as block_size of fam_config, and fam.safetensors" if value == 5 else "a fam_config that is invalid"
    for load in (transformerfam.from_pretrained, load_model):
        with pytest.raises(CorruptFileError, match=match):
            load(folder)


def test_configuration_that_is_read_with_is_that_of_both_files(tmp_path: Path) -> None:
    """Catches a folder that `save_model` writes with one configuration in `config.json` and another next to it."""
    model, tokenizer = make_passkey_model()
    own = model.fam_config
    save_model(model, tokenizer, tmp_path, config=own.replace(block_size=own.block_size + 1))
    assert model.fam_config == own == memory_of(model).config
    assert transformerfam.from_pretrained(tmp_path).fam_config.block_size == own.block_size + 1


def test_both_names_give_the_converted_model(saved: Path) -> None:
    """Catches a model of another class, in training mode, or without its memory."""
    expected = logits_of(convert(make_tiny_llama(), CONFIG))
    for load in (transformerfam.from_pretrained, AutoFamModelForCausalLM.from_pretrained):
        model = load(saved)
        assert type(model) is LlamaForCausalLM
        assert not model.training
        assert model.fam_config == CONFIG
        assert torch.equal(logits_of(model), expected)
    with pytest.warns(UserWarning, match="trained on base weights in float32, which are in bfloat16 here"):
        assert transformerfam.from_pretrained(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_named_models_and_adapters_are_loaded_too(tmp_path: Path) -> None:
    """Catches a name that is looked up on the Hub, and options that do nothing."""
    assert transformerfam.from_pretrained("tiny").fam_config == load_model("tiny")[0].fam_config
    save_passkey_model(tmp_path / "base")
    model, _ = load_model(tmp_path / "base")
    FamAdapter.from_model(model, notes={"base_model": str(tmp_path / "base")}).save_pretrained(tmp_path / "memory")
    loaded = transformerfam.from_pretrained(tmp_path / "memory")
    ids = random_ids(1, 30).clamp(max=50)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for name in ("tiny", tmp_path / "memory"):
        with pytest.raises(TransformerFamError, match="dtype is given, and .* is not a folder that transformers loads"):
            transformerfam.from_pretrained(name, dtype=torch.float16)


def test_what_is_no_converted_model_is_refused(tmp_path: Path, saved: Path) -> None:
    """Catches a base model that passes for one with a memory, and code of a folder."""
    make_tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(TransformerFamError, match=r"holds a model without a memory \(fam_config is missing"):
        transformerfam.from_pretrained(tmp_path)
    with pytest.raises(TransformerFamError, match="trust_remote_code is given, and no code of a model is ever run"):
        transformerfam.from_pretrained(saved, trust_remote_code=True)
    with pytest.raises(TransformerFamError, match="makes no model itself"):
        AutoFamModelForCausalLM()


def test_importing_the_package_changes_nothing_in_transformers(saved: Path) -> None:
    """Catches a converted model where transformers should load the base."""
    assert not hasattr(PreTrainedModel.from_pretrained, "takes_memory")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(saved)), logits_of(make_tiny_llama()))
    assert not hasattr(AutoModel.from_pretrained(saved), "fam")


@pytest.mark.usefixtures("installed")
def test_installed_it_serves_tools_that_load_models_themselves(tmp_path: Path) -> None:
    """Catches a tool that gets the base model, and a base model that our own loaders want and do not get."""
    save_passkey_model(tmp_path)
    model, tokenizer = load_model(tmp_path)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    pipe = pipeline("text-generation", model=str(tmp_path / "again"))
    assert pipe.model.fam_config == model.fam_config
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is LlamaForCausalLM
    assert not hasattr(AutoModel.from_pretrained(tmp_path / "again"), "fam")
    assert transformerfam.from_pretrained(tmp_path / "again").fam_config == model.fam_config
    bswa, _ = load_model(tmp_path / "again", system="bswa")
    assert bswa.fam_config.fam_length == 0


def test_threads_that_load_leave_transformers_as_it_was(saved: Path) -> None:
    """Catches what one load changes on a class, while another runs, and never takes back."""
    before = {name: value for name, value in vars(LlamaForCausalLM).items() if "ignore" in name}
    filters = list(logging.getLogger("transformers.modeling_utils").filters)
    models: list[Any] = []
    threads = [
        threading.Thread(target=lambda: models.extend(transformerfam.from_pretrained(saved) for _ in range(4)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models) == 16
    assert all(torch.equal(logits_of(model), logits_of(models[0])) for model in models)
    assert {name: value for name, value in vars(LlamaForCausalLM).items() if "ignore" in name} == before
    assert logging.getLogger("transformers.modeling_utils").filters == filters


def test_rows_of_a_memory_are_no_unexpected_weights(saved: Path) -> None:
    """Catches transformers' report of a weight that is where it belongs, and the loss of what else it reports."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        transformerfam.from_pretrained(saved)
        assert records == []
        AutoModelForCausalLM.from_pretrained(saved)
        assert "model.fam.prompt" in records.pop()
        tensors = load_file(saved / "model.safetensors")
        save_file(tensors | {"model.other": torch.ones(3)}, saved / "model.safetensors", {"format": "pt"})
        transformerfam.from_pretrained(saved)
        assert "model.other" in records.pop()
    finally:
        logger.removeHandler(handler)
