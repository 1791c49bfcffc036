"""Models stored in 8 bits: near what they were, a quarter of the bytes, loaded strictly and by `load_base`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.tensors import load_tensors, save_tensors
from transformerfam.weights.eight_bit import EIGHT_BIT_FILE, FORMAT_VERSION, KIND, load_eight_bit, save_eight_bit
from transformerfam.weights.models import load_base


def make_model(tie_word_embeddings: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie_word_embeddings,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Store a tiny model."""
    save_eight_bit(make_model(), make_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_are_within_half_a_step_and_logits_near(tmp_path: Path, is_tied: bool) -> None:
    """Catches scales of columns, a wrong step, heads that lose their tie, and norms that are rounded."""
    model = make_model(is_tied)
    save_eight_bit(model, make_tokenizer(), tmp_path / "model")
    loaded = load_eight_bit(tmp_path / "model")
    for (name, there), here in zip(model.named_parameters(), loaded.parameters(), strict=True):
        step = there.abs().amax(dim=-1, keepdim=True) / 127 if there.ndim == 2 else torch.zeros(1)
        assert bool(((there - here).abs() <= step / 2 + 1e-7).all()), name
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == is_tied
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = model(ids).logits, loaded(ids).logits
    assert (before - after).abs().max() < 0.05 * before.std()
    save_eight_bit(loaded, make_tokenizer(), tmp_path / "again")  # what is rounded stays as it is
    first, second = (load_file(tmp_path / name / EIGHT_BIT_FILE) for name in ("model", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first if first[name].dtype == torch.int8)


def test_ends_of_texts_are_kept(tmp_path: Path) -> None:
    """Catches a chat model that does not stop."""
    model = make_model()
    model.generation_config.eos_token_id = [1, 5]
    save_eight_bit(model, make_tokenizer(), tmp_path / "model")
    assert load_eight_bit(tmp_path / "model").generation_config.eos_token_id == [1, 5]


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Catches a row that one number spoils without a word."""
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 4] = float("nan")
    with pytest.raises(TransformerFamError, match="embed_tokens.weight holds numbers that are not finite"):
        save_eight_bit(model, make_tokenizer(), tmp_path / "model")


def test_file_has_a_quarter_of_the_bytes(saved: Path) -> None:
    """Catches float32 that is stored next to the integers."""
    num_bytes = sum(parameter.numel() * 4 for parameter in make_model().parameters())
    assert (saved / EIGHT_BIT_FILE).stat().st_size < 0.3 * num_bytes


def test_base_is_loaded_from_8_bits_in_float32(saved: Path) -> None:
    """Catches a folder that only this module can load."""
    model, tokenizer = load_base(saved)
    assert model.dtype == torch.float32
    assert len(tokenizer) == len(make_tokenizer())


def lose_scales(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight.scale"]


def lose_weight(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    del tensors["model.layers.0.self_attn.q_proj.weight.scale"]


def lose_rounded(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.weight"]


def cut_scales(tensors: dict[str, Any]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight.scale"
    tensors[name] = tensors[name][1:]


def cut_rows(tensors: dict[str, Any]) -> None:
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight.scale"):
        tensors[name] = tensors[name][1:]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lose_scales, "without scales of its rows"),
        (lose_weight, "lacks .*q_proj"),
        (lose_rounded, "lacks model.layers.0.self_attn.q_proj.weight, of which it has scales"),
        (cut_scales, "without scales of its rows, or scales of something else"),
        (cut_rows, "q_proj"),
    ],
)
def test_file_that_lacks_something_is_refused(saved: Path, change: Any, match: str) -> None:
    """Catches weights that are drawn at random, or rows that are multiplied with the scales of others."""
    tensors, metadata = load_tensors(saved / EIGHT_BIT_FILE, KIND, FORMAT_VERSION)
    change(tensors)
    save_tensors(saved / EIGHT_BIT_FILE, tensors, metadata)
    with pytest.raises(CorruptFileError, match=match):
        load_eight_bit(saved)


def test_damaged_file_is_refused(saved: Path) -> None:
    """Catches a bit that flipped on a disk."""
    content = bytearray((saved / EIGHT_BIT_FILE).read_bytes())
    content[-5] ^= 4
    (saved / EIGHT_BIT_FILE).write_bytes(content)
    with pytest.raises(CorruptFileError, match="checksum does not match"):
        load_base(saved)
