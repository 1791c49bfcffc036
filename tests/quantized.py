"""A model of torchao's int8 weights, converted: run by `test_tools` where torchao can be found."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tiny_llama import make_tiny_llama, random_ids
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from transformerfam import FamConfig, FamState, convert

CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)


def quantized(model: Any) -> Any:
    """Quantize in place."""
    quantize_(model, Int8WeightOnlyConfig())
    return model


@torch.no_grad()
def main() -> None:
    """Compare with the quantized base, convert before and after, save and load a state, generate."""
    ids = random_ids(1, 40)
    base = quantized(make_tiny_llama())
    expected = base(input_ids=ids).logits
    without_memory = convert(base, CONFIG.replace(fam_length=0, num_memory_segments=7))
    torch.testing.assert_close(without_memory(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    before, after = convert(quantized(make_tiny_llama()), CONFIG), quantized(convert(make_tiny_llama(), CONFIG))
    assert torch.equal(before(input_ids=ids).logits, after(input_ids=ids).logits)
    state = before.read(ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        state.save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of other weights
            loaded = FamState.load(path, convert(quantized(make_tiny_llama()), CONFIG))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            FamState.load(path, convert(quantized(make_tiny_llama(seed=1)), CONFIG))
        assert any("made on other base weights" in str(warning.message) for warning in caught)
    question = random_ids(1, 5, seed=1)
    answers = [before.generate(question, past_key_values=s, max_new_tokens=9, do_sample=False) for s in (state, loaded)]
    assert torch.equal(*answers)


if __name__ == "__main__":
    main()
