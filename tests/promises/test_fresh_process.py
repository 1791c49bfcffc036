"""What holds in a process that has imported no more than the README does."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformerfam import FamConfig, convert
torch.manual_seed(0)
sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = convert(LlamaForCausalLM(LlamaConfig(**sizes)), FamConfig(block_size=8, fam_length=3, num_memory_segments=1))
"""
SAVED_BY = {
    "save_pretrained": "model.save_pretrained(sys.argv[1])",
    "Trainer": (
        "from transformers import Trainer, TrainingArguments\n"
        "Trainer(model, TrainingArguments(sys.argv[1] + '/run', report_to=[])).save_model(sys.argv[1])"
    ),
    "a copy": "import copy\ncopy.deepcopy(model).save_pretrained(sys.argv[1])",
}


def run(text: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "way", [way if way == "save_pretrained" else pytest.param(way, marks=pytest.mark.slow) for way in SAVED_BY]
)
def test_memory_is_saved_and_loaded(tmp_path: Path, way: str) -> None:
    """Catches a memory that is written only where another module happens to be imported."""
    run(HEAD + SAVED_BY[way], str(tmp_path))
    assert (tmp_path / "fam.safetensors").is_file()
    loaded = "import sys, transformerfam; print(transformerfam.from_pretrained(sys.argv[1]).fam_config.fam_length)"
    assert run(loaded, str(tmp_path)).split()[-1] == "3"


@pytest.mark.slow
def test_pickled_model_is_saved_with_its_memory_by_another_process(tmp_path: Path) -> None:
    """Catches a method that a pickle loses."""
    run(HEAD + "torch.save(model, sys.argv[1])", str(tmp_path / "model.pt"))
    text = "import sys, torch; torch.load(sys.argv[1], weights_only=False).save_pretrained(sys.argv[2])"
    run(text, str(tmp_path / "model.pt"), str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "fam.safetensors").is_file()


def test_only_the_main_process_of_several_writes(tmp_path: Path) -> None:
    """Catches a memory that every process writes at once."""
    run(HEAD + "model.save_pretrained(sys.argv[1], is_main_process=False)", str(tmp_path))
    assert not (tmp_path / "fam.safetensors").exists()
