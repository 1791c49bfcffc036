"""The adapter folder: prompt, LoRA and a saved FAM, merged or not, and every refusal."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids, trained

from transformerfam import FamState
from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.fam.convert import fam_parameters
from transformerfam.weights import adapter
from transformerfam.weights.adapter import FamAdapter


@torch.no_grad()
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("fam_init", ["prompt", "prefix"])
def test_round_trip_gives_the_same_logits(tmp_path: Path, merge: bool, fam_init: str) -> None:
    """Catches parts that the folder forgets, and a merge that changes the model beyond rounding."""
    model, ids = trained(fam_init=fam_init), random_ids(1, 40)
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    base = make_tiny_llama()
    applied = FamAdapter.from_pretrained(tmp_path).apply(base, merge=merge)
    assert applied is base
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(applied(input_ids=ids).logits, expected, atol=1e-4 if merge else 0, rtol=0)
    assert any("lora" in name for name, _ in applied.named_parameters()) != merge


def test_only_prompt_and_lora_train() -> None:
    names = [name for name, value in trained().named_parameters() if value.requires_grad]
    assert names
    assert all("lora_" in name or name == "model.fam.prompt" for name in names)


def test_float16_storage_halves_the_folder(tmp_path: Path) -> None:
    model = trained()
    FamAdapter.from_model(model).save_pretrained(tmp_path / "full")
    FamAdapter.from_model(model).save_pretrained(tmp_path / "half", torch.float16)
    sizes = [(tmp_path / name / adapter.LORA_FILE).stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.65 * sizes[0]
    applied = FamAdapter.from_pretrained(tmp_path / "half").apply(make_tiny_llama())
    assert fam_parameters(applied)[0].dtype == torch.float32


def test_saved_fam_and_notes_travel(tmp_path: Path) -> None:
    """Catches a personal memory that is lost on the way."""
    model = trained()
    reading = model.read(random_ids(30))
    FamAdapter.from_model(model, saved_fam=reading, notes={"proven_filler_tokens": 8192}).save_pretrained(tmp_path)
    loaded = FamAdapter.from_pretrained(tmp_path)
    assert loaded.notes == {"proven_filler_tokens": 8192}
    assert loaded.saved_fam is not None
    assert torch.equal(loaded.saved_fam, reading.fams[:, 0])


def test_peft_reads_the_lora_by_itself(tmp_path: Path) -> None:
    """Catches a folder that PEFT's own tools refuse."""
    FamAdapter.from_model(trained()).save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.r == 4
    assert set(config.target_modules) == {"q_proj", "down_proj"}


@pytest.mark.parametrize("merge", [False, True])
def test_state_moves_between_merged_and_unmerged(tmp_path: Path, merge: bool) -> None:
    """Catches digests that change when LoRA is merged: warnings are errors here."""
    model = trained()
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    model.read(random_ids(20)).save(tmp_path / "state")
    applied = FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(), merge=merge)
    assert FamState.load(tmp_path / "state", applied).num_tokens_read == 20


def test_state_of_another_memory_warns(tmp_path: Path) -> None:
    trained().read(random_ids(20)).save(tmp_path / "state")
    other = trained(with_lora=False)
    with pytest.warns(UserWarning, match=r"made on other memory weights \(prompt and LoRA\)"):
        FamState.load(tmp_path / "state", other)


def test_other_weights_are_accepted_with_a_warning(tmp_path: Path) -> None:
    FamAdapter.from_model(trained()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"trained on other base weights: SHA-256 [0-9a-f]{12} there"):
        FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(seed=5))


def test_another_model_is_refused(tmp_path: Path) -> None:
    FamAdapter.from_model(trained()).save_pretrained(tmp_path)
    with pytest.raises(StateMismatchError, match="another model: num_hidden_layers is 2 there and 3 here"):
        FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(3))


def test_merged_model_gives_no_adapter(tmp_path: Path) -> None:
    FamAdapter.from_model(trained()).save_pretrained(tmp_path)
    merged = FamAdapter.from_pretrained(tmp_path).apply(make_tiny_llama(), merge=True)
    with pytest.raises(TransformerFamError, match="merged into the weights"):
        FamAdapter.from_model(merged)


@pytest.mark.parametrize("file", [adapter.FAM_FILE, adapter.LORA_FILE])
def test_damaged_files_are_refused(tmp_path: Path, file: str) -> None:
    FamAdapter.from_model(trained()).save_pretrained(tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[-5] ^= 16
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CorruptFileError, match="is damaged: its checksum does not match"):
        FamAdapter.from_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content[:50])
    with pytest.raises(CorruptFileError, match=r"not a readable safetensors file|cannot be read"):
        FamAdapter.from_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(CorruptFileError, match=r"does not exist|cannot be read"):
        FamAdapter.from_pretrained(tmp_path)


def test_lora_configuration_is_plain_json(tmp_path: Path) -> None:
    FamAdapter.from_model(trained()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / adapter.LORA_CONFIG_FILE).read_text())["peft_type"] == "LORA"


def test_full_disk_between_two_files_leaves_an_old_adapter_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches LoRA that is in place when the memory next to it finds none."""
    model = trained()
    FamAdapter.from_model(model).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformerfam.files.tensors.save_file", fail)
    with pytest.raises(TransformerFamError, match="No space left on device"):
        FamAdapter.from_model(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
