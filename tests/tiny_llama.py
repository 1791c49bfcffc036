"""Tiny random Llama models for tests that need no trained one."""

from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transformerfam import FamConfig, convert
from transformerfam.fam.convert import fam_parameters
from transformerfam.weights.adapter import inject_lora

VOCABULARY = 61


def make_tiny_llama(
    num_layers: int = 2, *, seed: int = 0, num_attention_heads: int = 4, num_key_value_heads: int = 2
) -> LlamaForCausalLM:
    """Make a random model of width 32 whose attention is sharp, so that a wrong key or position shows in the logits."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=8192,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids of the given shape."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Draw normal rows of the given shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONFIG = FamConfig(fam_key_bias=0.0, block_size=8, fam_length=3, num_memory_segments=1)


def trained(with_lora: bool = True, **fields: Any) -> Any:
    """A converted model whose prompt and LoRA are random, as if trained."""
    model = convert(make_tiny_llama(), CONFIG.replace(**fields))
    with torch.no_grad():
        for rows in fam_parameters(model):
            rows.copy_(random_rows(*rows.shape))
    if with_lora:
        torch.manual_seed(3)
        inject_lora(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model.eval()
