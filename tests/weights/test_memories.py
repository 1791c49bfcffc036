"""The kinds of memory: whatever serves one serves all."""

from pathlib import Path

import pytest
import torch
from tiny_llama import make_tiny_llama, random_ids
from tiny_models import make_tokenizer

from transformerfam import FamConfig
from transformerfam.files.tensors import is_ours
from transformerfam.rivals import RivalConfig
from transformerfam.tasks.provenance import memory_notes
from transformerfam.weights.memories import KINDS, MEMORY_FILES, MemoryConfig, give_memory, kind_of
from transformerfam.weights.models import load_model, save_model

CONFIGS: dict[str, MemoryConfig] = {
    "fam": FamConfig(fam_key_bias=0.0, block_size=4, fam_length=2, num_memory_segments=1),
    "rmt": RivalConfig(system="rmt", block_size=4, num_memory_tokens=2),
}


@pytest.mark.parametrize("system", CONFIGS)
def test_memory_of_every_kind_is_saved_with_its_notes_and_loaded(tmp_path: Path, system: str) -> None:
    """Catches a row of the table whose file, notes or loader is another kind's."""
    config, ids = CONFIGS[system], random_ids(1, 11)
    model = give_memory(make_tiny_llama(), config).eval()
    save_model(model, make_tokenizer(), tmp_path, {"steps": 3})
    file = kind_of(config).file
    assert [name for name in MEMORY_FILES if (tmp_path / name).exists()] == [file]
    assert is_ours(tmp_path / file, kind_of(config).contents)
    assert memory_notes(tmp_path, system)["steps"] == 3
    loaded, _ = load_model(tmp_path, system)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_every_kind_has_its_own_names_and_file() -> None:
    """Catches a kind that is added under the names or the file of another one, and would never be loaded."""
    names = [name for kind in KINDS for name in kind.systems]
    assert len(set(names)) == len(names)
    assert len({kind.file for kind in KINDS}) == len({kind.contents for kind in KINDS}) == len(KINDS)
    assert {type(config) for config in CONFIGS.values()} == {kind.config for kind in KINDS}
