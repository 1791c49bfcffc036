"""A tiny random model of every served family, with what sets the family apart switched on."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from transformerfam import FamConfig, FamState, convert
from transformerfam.config import UPDATE_PRESETS
from transformerfam.fam.convert import fam_parameters

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
NO_GROUPS = {"num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    **ROUTED,
    **NO_GROUPS,
}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral without window": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", EXPERTS | {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": HYBRID,
            "query_pre_attn_scalar": 8,
            "attn_implementation": "eager",  # the newest transformers takes it unasked
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 6, "layer_types": HYBRID, "query_pre_attn_scalar": 8},
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 1, 0]}),
    "granite": (
        "Granite",
        {
            "residual_multiplier": 0.6,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "cohere2": ("Cohere2", {"sliding_window": 6, "layer_types": HYBRID, "logit_scale": 1.0}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "gpt_neox in sequence": ("GPTNeoX", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),
    "stablelm in parallel": ("StableLm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "falcon": ("Falcon", {"multi_query": True, "alibi": False}),
    "falcon in sequence": ("Falcon", {"multi_query": False, "alibi": False, "parallel_attn": False}),
    "falcon of the new kind": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "gpt_oss": ("GptOss", EXPERTS | {"head_dim": 8, "sliding_window": 6, "layer_types": HYBRID}),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "deepseek_v3 in halves": ("DeepseekV3", LATENT | {"rope_interleave": False}),
}
"""By a name that begins with the model type: the name of its classes in transformers, and its configuration."""

FACTORS: dict[str, Any] = {
    "residual_multiplier": 0.6,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
GEMMA4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
}
HALF_ROTARY: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}

FURTHER_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 8, "initializer_range": 0.1}),
    "gemma4_text": ("Gemma4", GEMMA4),
    "gemma4_text with experts": (
        "Gemma4",
        GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": 6, "layer_types": HYBRID}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "olmo": ("Olmo", {"clip_qkv": 2.0}),
    "olmo3": ("Olmo3", {"sliding_window": 6, "layer_types": HYBRID}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": ("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "exaone4": ("Exaone4", {"sliding_window": 6, "layer_types": HYBRID}),
    "exaone4 without windows": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "glm": ("Glm", {"head_dim": 8, "attention_bias": True}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "glm4_moe": ("Glm4Moe", ROUTED | {"head_dim": 8, "use_qk_norm": True}),
    "glm4_moe_lite": ("Glm4MoeLite", LATENT),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8, "use_bias": True}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "cohere": ("Cohere", {"logit_scale": 1.0, "use_qk_norm": True}),
    "starcoder2": ("Starcoder2", {}),
    "starcoder2 with windows": ("Starcoder2", {"sliding_window": 7}),
    "helium": ("Helium", {"head_dim": 8}),
    "seed_oss": ("SeedOss", {"head_dim": 8}),
    "arcee": ("Arcee", {}),
    "apertus": ("Apertus", {}),
    "bitnet": ("BitNet", {}),
    "nemotron": ("Nemotron", HALF_ROTARY),
    "jais2": ("Jais2", {}),
    "internlm3": ("InternLM3", {"head_dim": 8}),
    "cwm": (
        "Cwm",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": HYBRID,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "granitemoe": ("GraniteMoe", EXPERTS | FACTORS),
    "granitemoeshared": ("GraniteMoeShared", EXPERTS | FACTORS | {"shared_intermediate_size": 16}),
    "dots1": ("Dots1", ROUTED | {"sliding_window": None}),
    "phimoe": ("Phimoe", EXPERTS | {"attention_bias": True}),
    "minimax_m2": ("MiniMaxM2", EXPERTS | {"head_dim": 8}),
    "minicpm3": ("MiniCPM3", LATENT | {"scale_depth": 1.4, "scale_emb": 3.0, "dim_model_base": 16}),
    "hyperclovax": ("HyperCLOVAX", FACTORS | {"head_dim": 8, "use_post_norm": True}),
    "nanochat": ("NanoChat", {}),
    "persimmon": ("Persimmon", {}),
    "vaultgemma": (
        "VaultGemma",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": HYBRID,
            "query_pre_attn_scalar": 8,
            "attn_implementation": "eager",
        },
    ),
    "solar_open": ("SolarOpen", ROUTED | {"head_dim": 8}),
    "youtu": ("Youtu", LATENT),
    "exaone_moe": (
        "ExaoneMoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 16,
            "sliding_window": 6,
            "layer_types": HYBRID,
        },
    ),
    "diffllama": ("DiffLlama", {}),
}
"""Families whose layers are put together of parts that those of `CASES` have; fewer tests go through them."""

ALL_CASES = CASES | FURTHER_CASES
OWN_CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "Gemma4": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "InternLM3": ("InternLM3Config", "LlamaForCausalLM"),
}


def is_at_hand(case: str) -> bool:
    """Return whether the installed transformers has a case's classes."""
    return all(hasattr(transformers, name) for name in class_names(case))


def class_names(case: str) -> tuple[str, str]:
    """Return the names of a case's configuration and model in transformers."""
    stem = ALL_CASES[case][0]
    return OWN_CLASSES.get(stem, (f"{stem}Config", f"{stem}ForCausalLM"))


EVERY_CASE = [
    *CASES,
    *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER_CASES if is_at_hand(case)),
]
"""For tests that all families pass: those of `CASES` in `make test`, the others in `make prove`."""


def make_tiny(case: str, **changes: Any) -> PreTrainedModel:
    """Make a random model of width 32 and three layers whose attention is sharp, so that a wrong key shows."""
    options, (config_name, model_name) = ALL_CASES[case][1], class_names(case)
    config_class: Callable[..., Any] = getattr(transformers, config_name)
    config = config_class(**SHAPE | options | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, model_name)(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("ln_f.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif "sinks" in name or name.endswith(("bias", "router.weight")):
                torch.nn.init.normal_(parameter, std=0.2)
    return model


CONFIG = FamConfig(block_size=5, fam_length=2, num_memory_segments=1, fam_key_bias=0.0)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "others": {
        "fam_query_position": "written",
        "fam_init": "prefix",
        "zero_first_residual": False,
        "window": 4,
        "fam_key_bias": -1.0,
    },
    "gated": UPDATE_PRESETS["gated_rows"],
    "gated in its layer": {"fam_update": "gated", "fam_key_bias": -1.0},
    "slots": UPDATE_PRESETS["gated_slots"],
    "block": UPDATE_PRESETS["gated"],
}


every_case = pytest.mark.parametrize("case", EVERY_CASE)


def draw_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _layer_types(case: str) -> list[str]:
    return getattr(make_tiny(case).config, "layer_types", None) or []


def config_of(case: str, options: str) -> FamConfig:
    """Return a configuration; a hybrid model of the tests has one layer that would carry FAM, too few for `next`."""
    changes, layer_types = OPTIONS[options], _layer_types(case)
    if changes.get("fam_feeds", "same") != "same" and len(set(layer_types)) > 1:
        changes = changes | {"fam_layers": (0, 2)}  # layer 1 carries the rows up
    return CONFIG.replace(**changes)


def make_converted(case: str, config: FamConfig = CONFIG, **changes: Any) -> Any:
    """Convert a tiny model and draw its initial FAM, so that rows differ and matter."""
    return copy.deepcopy(_converted_once(case, config, tuple(changes.items())))


@functools.lru_cache(maxsize=256)
def _converted_once(case: str, config: FamConfig, changes: tuple[tuple[str, Any], ...]) -> Any:
    """Convert a tiny model once for all tests: the checks of a conversion take longer than most of them."""
    model: Any = convert(make_tiny(case, **dict(changes)), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for rows in fam_parameters(model):
            rows.copy_(torch.randn(rows.shape, generator=generator))
    return model


def read_in_chunks(model: Any, ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, FamState]:
    state = model.init_state(len(ids))
    logits = [model(input_ids=part, past_key_values=state).logits for part in ids.split(lengths, dim=1)]
    return torch.cat(logits, dim=1), state
