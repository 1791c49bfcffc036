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
    "save_pretrained": (
        "from pathlib import Path\n"
        "model.save_pretrained(sys.argv[1], is_main_process=False)\n"
        "assert not list(Path(sys.argv[1]).iterdir()), 'a process of several that is not the main one has written'\n"
        "model.save_pretrained(sys.argv[1])"
    ),
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
    """Catches a memory that needs an import of another module, and one that every process of several writes."""
    loaded = "\nfrom transformerfam import from_pretrained; print(from_pretrained(sys.argv[1]).fam_config.fam_length)"
    assert run(HEAD + SAVED_BY[way] + loaded, str(tmp_path)).split()[-1] == "3"
    assert (tmp_path / "fam.safetensors").is_file()


@pytest.mark.slow
def test_pickled_model_is_saved_with_its_memory_by_another_process(tmp_path: Path) -> None:
    """Catches a method that a pickle loses."""
    run(HEAD + "torch.save(model, sys.argv[1])", str(tmp_path / "model.pt"))
    text = "import sys, torch; torch.load(sys.argv[1], weights_only=False).save_pretrained(sys.argv[2])"
    run(text, str(tmp_path / "model.pt"), str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "fam.safetensors").is_file()
