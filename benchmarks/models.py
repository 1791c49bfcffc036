"""The models that are timed: SmolLM2, and a random one of about 8M parameters of the same shape family."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.placement import PLACEMENT
from transformerfam import FamConfig, convert
from transformerfam.weights.models import load_base

MODELS = ("smollm2", "random_8m")
OTHER_MODELS = ("random_135m", "random_1b", "tiny")
"""Timed when named: random weights in the shape of SmolLM2-135M, for machines without its package, and of a model of
1.0 billion parameters, on devices; the shipped tiny model."""


SHAPES = {
    "random_8m": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "random_135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "random_1b": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@functools.cache
def base_model(name: str) -> PreTrainedModel:
    """Return an unconverted model in evaluation mode, where `place` says, on attention back end `sdpa`."""
    if name in ("smollm2", "tiny"):
        return load_base(name)[0].to(PLACEMENT.device, PLACEMENT.dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[name],
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().to(PLACEMENT.device, PLACEMENT.dtype)


def converted(name: str, is_shared: bool = True, **fields: Any) -> Any:
    """Return a converted copy with the memory open, as training leaves it; shared are the weights of the base."""
    base = base_model(name)
    shared = {id(parameter): parameter for parameter in base.parameters() if is_shared}
    return convert(copy.deepcopy(base, shared), FamConfig(**{"fam_key_bias": 0.0} | fields)).eval()


def next_block(name: str, **fields: Any) -> tuple[Any, Callable[[], Any]]:
    """Return a converted copy, and what reads one more block with it after full memory segments."""
    reader = converted(name, **fields)
    size = reader.fam_config.block_size
    state = reader.read(random_tokens(name, (reader.fam_config.num_memory_segments + 1) * size))
    block = random_tokens(name, size, seed=1)
    return reader, lambda: reader.read(block, state)


def random_tokens(name: str, num_tokens: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    """Draw token ids `(B, T)`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(base_model(name).config.vocab_size, (batch_size, num_tokens), generator=generator)
    return ids.to(PLACEMENT.device)
