"""The mean of several memories, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids, trained

from transformerfam.errors import StateMismatchError, TransformerFamError
from transformerfam.training.averaging import average_memories
from transformerfam.weights.adapter import FamAdapter
from transformerfam.weights.models import BASE_NOTE


def saved(folder: Path, factor: float = 1.0, notes: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A memory whose tensors are `factor` times the same random ones."""
    memory = FamAdapter.from_model(trained(**fields), notes=notes)
    memory.tensors = {name: factor * value for name, value in memory.tensors.items()}
    memory.lora = {name: factor * value for name, value in memory.lora.items()}
    memory.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fam_init", ["prompt", "prefix"])
def test_average_is_the_mean_of_all_tensors(tmp_path: Path, fam_init: str) -> None:
    """Catches a tensor that is taken from one memory alone, and a sum in place of a mean."""
    folders = [saved(tmp_path / str(factor), factor, fam_init=fam_init) for factor in (1.0, 2.0, 6.0)]
    average_memories(folders, tmp_path / "mean")
    first, mean = FamAdapter.from_pretrained(folders[0]), FamAdapter.from_pretrained(tmp_path / "mean")
    assert mean.config == first.config
    for parts, expected in ((mean.tensors, first.tensors), (mean.lora, first.lora)):
        assert parts.keys() == expected.keys()
        for name, value in parts.items():
            torch.testing.assert_close(value.float(), 3 * expected[name].float(), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_average_is_read_with_the_overrides_and_says_what_it_is_made_of(tmp_path: Path) -> None:
    """Catches a mean that cannot be read, or whose origin is lost."""
    notes = [{BASE_NOTE: "tiny", "max_training_filler_tokens": tokens} for tokens in (170, 512)]
    folders = [saved(tmp_path / str(i), notes=note) for i, note in enumerate(notes)]
    mean = average_memories(folders, tmp_path / "mean", {"block_size": 16})
    assert mean.notes == {BASE_NOTE: "tiny", "max_training_filler_tokens": 512, "average_of": notes}
    applied = FamAdapter.from_pretrained(tmp_path / "mean").apply(make_tiny_llama())
    same = FamAdapter.from_pretrained(folders[0])
    same.config = same.config.replace(block_size=16)
    expected, ids = same.apply(make_tiny_llama()), random_ids(1, 40)
    torch.testing.assert_close(applied(input_ids=ids).logits, expected(input_ids=ids).logits, atol=2e-2, rtol=0)


def test_memories_that_have_no_mean_are_refused(tmp_path: Path) -> None:
    """Catches a mean of things that only look alike."""
    first = saved(tmp_path / "first")
    model = trained()
    FamAdapter.from_model(model, saved_fam=model.read(random_ids(30))).save_pretrained(tmp_path / "with_fam")
    other_base = FamAdapter.from_pretrained(first)
    other_base.base_digest = "0" * 64
    other_base.save_pretrained(tmp_path / "other_base")
    rescaled, whole = tmp_path / "rescaled", saved(tmp_path / "whole")
    other_scale = FamAdapter.from_pretrained(first)
    assert other_scale.lora_config is not None
    other_scale.lora_config = other_scale.lora_config | {"use_rslora": True}
    other_scale.save_pretrained(rescaled)
    (whole / "config.json").write_text("{}")
    cases = [
        ([first], TransformerFamError, "1 memory cannot be averaged"),
        ([first, tmp_path / "with_fam"], TransformerFamError, "starts from a saved FAM"),
        ([first, tmp_path / "other_base"], StateMismatchError, "differ in base weights: 000000000000"),
        ([first, saved(tmp_path / "long", fam_length=4)], StateMismatchError, "differ in FamConfig: {'fam_length': 4}"),
        ([first, saved(tmp_path / "bare", with_lora=False)], StateMismatchError, "differ in LoRA: "),
        ([first, saved(tmp_path / "position", fam_position="zero")], StateMismatchError, "differ in FamConfig"),
        ([first, rescaled], StateMismatchError, "differ in LoRA: {'use_rslora': True} and {'use_rslora': False}"),
        ([first, whole], TransformerFamError, "holds a whole model"),
    ]
    for folders, error, message in cases:
        with pytest.raises(error, match=message):
            average_memories(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
