"""The tiny model of the passkey tests, and its tokenizer."""

import pytest
import tiny_models

from transformerfam.training.tiny import build_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_models.make_passkey_model()[0]
