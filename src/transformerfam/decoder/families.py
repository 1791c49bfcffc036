"""The families of transformers decoders that conversion serves, and where the seams are in each of them.

Here are names and one choice per family. That they are right for the model at hand, in the transformers
version at hand, is what conversion checks with numbers (`seams`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


def _never(config: Any) -> bool:
    return False


def _always(config: Any) -> bool:
    return True


def _parallel_if_configured(config: Any) -> bool:
    return bool(config.use_parallel_residual)


def _falcon_is_parallel(config: Any) -> bool:
    return bool(config.parallel_attn or config.new_decoder_architecture)


def one_norm(config: Any) -> tuple[str, ...]:
    """Return the entries of a layer with one norm in front of all."""
    return ("input_layernorm",)


def attention_itself(config: Any) -> tuple[str, ...]:
    """Return the entries of a layer without a norm in front of attention."""
    return ("self_attn",)


def _neox_norms(config: Any) -> tuple[str, ...]:
    return ("input_layernorm", "post_attention_layernorm") if config.use_parallel_residual else ("input_layernorm",)


def _falcon_norms(config: Any) -> tuple[str, ...]:
    has_two = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    return ("ln_attn", "ln_mlp") if has_two else ("input_layernorm",)


def one(config: Any) -> float:
    """Return the factor of a branch that is added as it is."""
    return 1.0


def residual_multiplier(config: Any) -> float:
    """Return Granite's factor of a branch."""
    return float(config.residual_multiplier)


def _nothing(config: Any) -> str | None:
    return None


def _gemma4_reason(config: Any) -> str | None:
    if config.hidden_size_per_layer_input:
        return "its layers are given embeddings of the token ids, which the rows of a FAM do not have"
    if config.num_kv_shared_layers:
        return "its upper layers take the keys of lower ones, past the cache"
    return None


def _attention_norm(config: Any) -> tuple[str, ...]:
    return ("attention_layernorm",)


def _depth_factor(config: Any) -> float:
    return float(config.scale_depth) / math.sqrt(config.num_hidden_layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Where the seams are in the layers of one family, by the names of submodules.

    Attributes:
        name: its usual name.
        layers: the decoder's list of layers.
        attention: a layer's attention.
        output_projection: the last matrix of an attention.
        entries: the submodules of a layer that are given its input, besides the residual, from the configuration.
        branch: the submodule of a layer whose output is added to the residual after attention: attention itself, or a
            norm after it.
        branch_factor: what that output is multiplied with before it is added, from the configuration.
        behind: the submodule of a layer that is given the sum; with a parallel residual nothing is.
        is_parallel: whether attention and feed-forward are added to one residual, from the configuration.
        has_attention_interface: whether attention goes through transformers' attention interface, so that a back end
            without dense masks can serve it.
        asks_by_queries: whether rows enter attention's output through their queries alone, called for once, so that
            queries made before can replace them; not where the output has a gate, or attention runs twice.
        since: first version of this package that serves it.
        special: what sets the family apart from Llama.
        refuses: why a member cannot be served, from the configuration; None where it can.
    """

    name: str
    layers: str = "layers"
    attention: str = "self_attn"
    output_projection: str = "o_proj"
    entries: Callable[[Any], tuple[str, ...]] = one_norm
    branch: str = "self_attn"
    branch_factor: Callable[[Any], float] = one
    behind: str = "post_attention_layernorm"
    is_parallel: Callable[[Any], bool] = _never
    has_attention_interface: bool = True
    asks_by_queries: bool = True
    since: str = "0.1.0"
    special: str = ""
    refuses: Callable[[Any], str | None] = _nothing


SEQUENCES: dict[str, dict[str, Any]] = {
    "Gemma 2": {"branch": "post_attention_layernorm", "behind": "pre_feedforward_layernorm"},
    "GLM-4-0414": {"branch": "post_self_attn_layernorm", "behind": "post_attention_layernorm"},
    "OLMo 2": {"entries": attention_itself, "branch": "post_attention_layernorm", "behind": "mlp"},
    "Llama": {"behind": "post_attention_layernorm"},
    "VaultGemma": {"behind": "pre_feedforward_layernorm"},
    "StableLM in parallel": {"behind": "mlp", "is_parallel": _always},
}
"""Usual orders of a layer's parts, by a family that has it; where several fit by name, numbers choose."""

FAMILIES = {
    "llama": Family(name="Llama"),
    "mistral": Family(name="Mistral", special="a sliding window on every layer, which limits the memory segments"),
    "mixtral": Family(name="Mixtral", special="mixture of experts; FAM rows are routed as tokens are"),
    "qwen2": Family(name="Qwen2", special="biases; optionally sliding windows on the upper layers"),
    "qwen3": Family(name="Qwen3", special="norms on queries and keys"),
    "qwen3_moe": Family(name="Qwen3-MoE", special="norms on queries and keys; mixture of experts"),
    "gemma2": Family(
        name="Gemma 2",
        **SEQUENCES["Gemma 2"],
        special="soft caps (attention back end eager); norms after attention and feed-forward; every other layer "
        "slides and keeps its window",
    ),
    "gemma3_text": Family(
        name="Gemma 3 (text)",
        **SEQUENCES["Gemma 2"],
        special="norms after attention and feed-forward; five of six layers slide, with their own RoPE, and keep "
        "their window",
    ),
    "phi3": Family(name="Phi-3", special="one matrix for queries, keys and values; RoPE of type longrope is refused"),
    "olmo2": Family(
        name="OLMo 2",
        **SEQUENCES["OLMo 2"],
        special="norms after attention and feed-forward alone; norms on queries and keys",
    ),
    "smollm3": Family(name="SmolLM3", special="every fourth layer has no RoPE"),
    "granite": Family(
        name="Granite",
        branch_factor=residual_multiplier,
        special="factors on embeddings, attention, residual branches and logits",
    ),
    "cohere2": Family(
        name="Cohere 2 (Command R7B)",
        is_parallel=_always,
        special="parallel residual; interleaved RoPE on sliding layers, which keep their window, and none elsewhere",
    ),
    "gpt_neox": Family(
        name="GPT-NeoX (Pythia)",
        attention="attention",
        output_projection="dense",
        entries=_neox_norms,
        branch="attention",
        is_parallel=_parallel_if_configured,
        special="parallel residual; RoPE on a part of every head",
    ),
    "phi": Family(
        name="Phi (1, 1.5, 2)",
        output_projection="dense",
        is_parallel=_always,
        special="parallel residual; RoPE on a part of every head",
    ),
    "stablelm": Family(
        name="StableLM",
        is_parallel=_parallel_if_configured,
        special="RoPE on a part of every head; optionally a parallel residual",
    ),
    "falcon": Family(
        name="Falcon",
        layers="h",
        attention="self_attention",
        output_projection="dense",
        entries=_falcon_norms,
        branch="self_attention",
        is_parallel=_falcon_is_parallel,
        has_attention_interface=False,
        special="parallel residual; one key head; its attention takes dense masks alone; with ALiBi it is refused",
    ),
    "gpt_oss": Family(
        name="GPT-OSS",
        special="a learned sink in every head's softmax (attention back end eager); mixture of experts; every other "
        "layer slides and keeps its window",
    ),
    "deepseek_v2": Family(
        name="DeepSeek-V2", special="latent attention: carried are latents, and one rotary key for all heads"
    ),
    "deepseek_v3": Family(
        name="DeepSeek-V3", special="latent attention: carried are latents, and one rotary key for all heads"
    ),
    "gemma": Family(name="Gemma", special="embeddings multiplied by the root of their width"),
    "gemma4_text": Family(
        name="Gemma 4 (text)",
        **SEQUENCES["Gemma 2"],
        special="norms after attention and feed-forward; five of six layers slide, with their own heads and RoPE, and "
        "keep their window; members with embeddings per layer (E2B, E4B) are refused",
        refuses=_gemma4_reason,
    ),
    "qwen2_moe": Family(
        name="Qwen2-MoE",
        special="mixture of experts and a shared one; optionally sliding windows on the upper layers",
    ),
    "ministral": Family(name="Ministral", special="some layers slide and keep their window"),
    "ministral3": Family(
        name="Ministral 3",
        special="queries grow with the position from `original_max_position_embeddings` on; FAM keeps positions in its "
        "window, where they grow only if the window is that long",
    ),
    "olmo": Family(name="OLMo", special="norms without weights; optionally clipped queries, keys and values"),
    "olmo3": Family(
        name="OLMo 3",
        **SEQUENCES["OLMo 2"],
        special="norms after attention and feed-forward alone; norms on queries and keys; three of four layers slide "
        "and keep their window",
    ),
    "olmoe": Family(name="OLMoE", special="mixture of experts; norms on queries and keys"),
    "flex_olmo": Family(
        name="FlexOlmo",
        **SEQUENCES["OLMo 2"],
        special="norms after attention and feed-forward alone; norms on queries and keys; mixture of experts",
    ),
    "exaone4": Family(
        name="EXAONE 4.0",
        **SEQUENCES["OLMo 2"],
        special="norms after attention and feed-forward alone; norms on queries and keys; where some layers slide, "
        "the others have no RoPE",
    ),
    "glm": Family(name="GLM-4", special="interleaved RoPE on a part of every head"),
    "glm4": Family(
        name="GLM-4-0414",
        branch="post_self_attn_layernorm",
        special="norms in front of and after attention and feed-forward; interleaved RoPE on a part of every head",
    ),
    "glm4_moe": Family(
        name="GLM-4.5 (MoE)",
        special="mixture of experts and a shared one; RoPE on a part of heads; optionally norms on queries and keys",
    ),
    "glm4_moe_lite": Family(
        name="GLM-4.7-Flash", special="latent attention: carried are latents, and one rotary key for all heads"
    ),
    "ernie4_5": Family(name="ERNIE 4.5", special="interleaved RoPE"),
    "ernie4_5_moe": Family(
        name="ERNIE 4.5 (MoE)", special="interleaved RoPE; mixture of experts and shared ones on the upper layers"
    ),
    "cohere": Family(name="Cohere (Command R)", is_parallel=_always, special="parallel residual; interleaved RoPE"),
    "starcoder2": Family(
        name="StarCoder2", special="layer norms and biases; optionally a sliding window on every layer"
    ),
    "helium": Family(name="Helium", special="interleaved RoPE"),
    "seed_oss": Family(name="Seed-OSS", special="biases on queries, keys and values"),
    "arcee": Family(name="Arcee (AFM)", special="a feed-forward of two matrices, with squared ReLU"),
    "apertus": Family(
        name="Apertus",
        entries=_attention_norm,
        behind="feedforward_layernorm",
        special="norms on queries and keys; a feed-forward of two matrices, with xIELU",
    ),
    "bitnet": Family(name="BitNet", special="norms in front of the last matrix of attention and feed-forward"),
    "nemotron": Family(
        name="Nemotron", special="layer norms whose weight is added to 1; RoPE on a part of every head; squared ReLU"
    ),
    "jais2": Family(name="Jais 2", special="layer norms and biases; squared ReLU"),
    "internlm3": Family(name="InternLM3", special="Llama's class; not in transformers 5.14"),
    "cwm": Family(name="CWM", special="three of four layers slide and keep their window"),
    "granitemoe": Family(
        name="Granite-MoE",
        branch_factor=residual_multiplier,
        special="mixture of experts; factors on embeddings, attention, residual branches and logits",
    ),
    "granitemoeshared": Family(
        name="Granite-MoE (shared)",
        branch_factor=residual_multiplier,
        special="mixture of experts and a shared one; factors on embeddings, attention, residual branches and logits",
    ),
    "dots1": Family(
        name="dots.llm1", special="norms on queries and keys; mixture of experts; optionally sliding windows"
    ),
    "phimoe": Family(name="Phi-3.5-MoE", special="mixture of experts; layer norms; RoPE of type longrope is refused"),
    "minimax_m2": Family(
        name="MiniMax-M2", special="mixture of experts; norms on queries and keys; RoPE on a part of every head"
    ),
    "minicpm3": Family(
        name="MiniCPM3",
        branch_factor=_depth_factor,
        special="latent attention: carried are latents, and one rotary key for all heads; factors on embeddings, "
        "residual branches and logits",
    ),
    "hyperclovax": Family(
        name="HyperCLOVA X",
        branch="post_norm1",
        branch_factor=residual_multiplier,
        special="optionally norms after attention and feed-forward; factors as Granite's",
    ),
    "nanochat": Family(name="nanochat", special="norms without weights, on queries and keys after RoPE; squared ReLU"),
    "persimmon": Family(
        name="Persimmon",
        output_projection="dense",
        special="one matrix for queries, keys and values; norms on queries and keys; RoPE on a part of every head",
    ),
    "vaultgemma": Family(
        name="VaultGemma",
        behind="pre_feedforward_layernorm",
        special="soft caps (attention back end eager); every other layer slides and keeps its window",
    ),
    "solar_open": Family(name="Solar Open", special="mixture of experts and a shared one"),
    "youtu": Family(
        name="Youtu-LLM", special="latent attention: carried are latents, and one rotary key for all heads"
    ),
    "exaone_moe": Family(
        name="EXAONE-MoE",
        special="norms on queries and keys; mixture of experts; where some layers slide, the others have no RoPE",
    ),
    "diffllama": Family(
        name="DiffLlama",
        asks_by_queries=False,
        special="differential attention: the difference of two groups of heads",
    ),
}
"""By `model_type`."""

NOT_SERVED = {
    "gemma3n_text": "its layers pass four streams of hidden states on, and are given embeddings of the token ids; the "
    "rows of a FAM are one stream, and have no ids",
    "hunyuan_v1_dense": "its keys go through a norm with weights after RoPE, so that no rotation takes kept keys to "
    "another position",
    "hunyuan_v1_moe": "its keys go through a norm with weights after RoPE, so that no rotation takes kept keys to "
    "another position",
}
"""Families that were looked at and cannot be served, by `model_type`, with the reason."""
