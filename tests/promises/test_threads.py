"""Threads that read with one model, each into its own state, do not affect each other."""

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_families import VOCABULARY, make_tiny

from transformerfam import FamConfig, convert
from transformerfam.rivals import RIVAL_NAMES, RivalConfig, attach

NUM_THREADS = 4
NUM_ROUNDS = 3


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Let threads take turns so often that a hook of one falls between two hooks of another."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def assert_threads_read_as_one(model: Any) -> None:
    @torch.no_grad()
    def read(seed: int) -> torch.Tensor:
        ids = torch.randint(1, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(seed))
        state = model.init_state()
        first = [model(input_ids=part, past_key_values=state).logits for part in ids.split([4, 7], dim=1)]
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        answer = model.generate(ids[:, :3], past_key_values=state, **options)
        return torch.cat((torch.cat(first, dim=1).flatten(), answer.flatten()))

    seeds = range(NUM_THREADS * NUM_ROUNDS)
    expected = [read(seed) for seed in seeds]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for found, required in zip(pool.map(read, seeds), expected, strict=True):
            torch.testing.assert_close(found, required, atol=1e-5, rtol=1e-5)


FAST = ("paper-gemma3_text", "static-olmo2", "gated-gemma2", "gated-gemma3_text")


@pytest.mark.parametrize(
    ("update", "case"),
    [
        pytest.param(*pair, marks=[] if "-".join(pair) in FAST else pytest.mark.slow)
        for pair in itertools.product(
            ["paper", "static", "gated"], ["llama", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "falcon"]
        )
    ],
)
def test_threads_do_not_mix_their_readings(update: str, case: str) -> None:
    """Catches what a hook leaves on the model for the next one, where another thread finds it."""
    shape = {"block_size": 4, "fam_length": 2, "num_memory_segments": 1, "fam_key_bias": 0.0}
    preset = "gated" if update == "gated" else "paper"
    changes = {"fam_query": "initial", "fam_residual": "none"} if update == "static" else {}
    assert_threads_read_as_one(convert(make_tiny(case), FamConfig.preset(preset, **shape | changes)))


@pytest.mark.parametrize(
    "system",
    [
        name if name in ("armt", "gated_linear", "rmt") else pytest.param(name, marks=pytest.mark.slow)
        for name in RIVAL_NAMES
    ],
)
def test_threads_do_not_mix_rivals(system: str) -> None:
    """Catches a rival that keeps on itself what belongs to a piece."""
    assert_threads_read_as_one(attach(make_tiny("llama"), RivalConfig(system=system, block_size=4)))
