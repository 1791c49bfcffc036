"""The shipped tiny memory, live."""

import json
from importlib.resources import files

import pytest
import torch

from transformerfam.fam.convert import memory_of
from transformerfam.tasks.passkey_evaluation import evaluate_passkey
from transformerfam.weights.models import load_model

NUM_FILLER_TOKENS = 8192


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    model, tokenizer = load_model("tiny")
    return list(
        evaluate_passkey(
            model, tokenizer, filler_lengths=[NUM_FILLER_TOKENS], num_keys=20, seed=1, batch_size=20, model_name="tiny"
        )
    )


def test_tiny_memory_recalls_behind_8192_tokens(rows: list[dict[str, object]]) -> None:
    """Catches a change of the algorithm that the shipped weights do not survive."""
    assert len(rows) == 20
    wrong = [(row["key"], row["answer"], row["jitter"]) for row in rows if not row["correct"]]
    assert wrong == []


def test_tiny_memory_is_what_its_card_says() -> None:
    """Catches weights above the size that is promised, and a memory that still leans on a bias."""
    model, _ = load_model("tiny")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert memory_of(model).config.fam_key_bias == 0.0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    card = json.loads((files("transformerfam") / "data" / "tiny" / "card.json").read_text())
    assert card["proven_filler_tokens"] >= NUM_FILLER_TOKENS
