"""What a type checker sees of a model with a memory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = """
from typing import Any

from transformers import LlamaForCausalLM

from transformerfam import FamConfig, convert, from_pretrained
from transformerfam.rivals import RivalConfig, attach

llama: LlamaForCausalLM
model = convert(llama, FamConfig())
reveal_type(model.read)
reveal_type(model.init_state())
reveal_type(model.fam_config.fam_length)
reveal_type(from_pretrained("tiny").read([1, 2]))
rival = attach(llama, RivalConfig(system="rmt"))
reveal_type(rival.read([1, 2]))
reveal_type(rival.rival_config.block_size)
model.to("cpu").eval().generate(input_ids=None, max_new_tokens=1)
model.save_pretrained("folder", max_shard_size="1GB")
for _ in model.parameters():
    break
"""
REVEALED = [
    "FamState",
    "FamState",
    "int",
    "FamState",
    "RivalState",
    "int",
]
MISTAKES = {
    "model.raed([1])": 'has no attribute "raed"',
    "rival.fam_config": 'has no attribute "fam_config"',
    "model.read([1], progress=0.5)": 'has incompatible type "float"',
    "model.init_state(batch=2)": 'Unexpected keyword argument "batch"',
    "model.fam_config.fam_lenght": 'has no attribute "fam_lenght"',
}


def check(folder: Path, text: str) -> list[str]:
    """Return what mypy says of a text, with the package's own settings."""
    file = folder / "snippet.py"
    file.write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return [line.partition(": ")[2] for line in done.stdout.splitlines() if "snippet.py" in line]


@pytest.mark.slow  # it is part of `make types`, whose cache it shares
@pytest.mark.timeout(600)
def test_what_convert_returns_is_known_and_mistakes_are_errors(tmp_path: Path) -> None:
    """Catches a method of ours that a checker takes for anything, and a misspelt one that it lets pass."""
    lines = check(tmp_path, SNIPPET + "\n".join(MISTAKES))
    notes = [line for line in lines if line.startswith("note: Revealed")]
    errors = [line for line in lines if line.startswith("error")]
    assert len(notes) == len(REVEALED), lines
    for note, expected in zip(notes, REVEALED, strict=True):
        assert expected in note
    assert len(errors) == len(MISTAKES), errors
    for error, expected in zip(errors, MISTAKES.values(), strict=True):
        assert expected in error
