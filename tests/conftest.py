"""What all tests share."""

import gc
import random
from pathlib import Path

import pytest
import torch
from tiny_models import PASSKEY_TEXT, save_passkey_model

from transformerfam import comparison

# One thread for each test process: two that block each other on a busy machine are many times slower than one.
torch.set_num_threads(1)
torch.set_flush_denormal(True)
# Thousands of small models and graphs: looking for cycles at Python's own pace takes a sixth of the tests' time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Let a test draw the same numbers alone and after others."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny model whose vocabulary is the passkey text's."""
    path = tmp_path_factory.mktemp("model")
    save_passkey_model(path)
    return path


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Write a text that the model of `folder` knows."""
    path = tmp_path / "book.txt"
    path.write_text(PASSKEY_TEXT, encoding="utf-8")
    return path


@pytest.fixture
def short_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a comparison note the bytes that are carried after a few tokens, where it would read thousands."""
    for module in (comparison.run, comparison.report):
        monkeypatch.setattr(module, "BYTES_LENGTHS", (8, 24))
