"""The model and the reading of the state files in `tests/data`, one written under each edge of the tested versions.

`python tests/state_file.py` writes that of the installed transformers.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_llama import VOCABULARY, make_tiny_llama

from transformerfam import FamConfig, convert

FOLDER = Path(__file__).parent / "data"
NUM_READ = 21


@torch.no_grad()
def make_same_model() -> Any:
    """Return a converted model whose weights are the same to the bit with every version and processor."""
    model: Any = convert(
        make_tiny_llama(), FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)
    )
    for i, parameter in enumerate(model.parameters()):
        numbers = (7919 * torch.arange(parameter.numel()) + 104729 * i) % 1009
        parameter.copy_((numbers.float() / 1009 - 0.5).view_as(parameter))
    return model


def text() -> torch.Tensor:
    """Return the token ids that were read, `(1, 21)`."""
    return 7 * torch.arange(NUM_READ)[None] % VOCABULARY


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    state = make_same_model().read(text())
    state.save(FOLDER / f"state_of_transformers_{transformers.__version__}.safetensors")
