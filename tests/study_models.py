"""A tiny random model that can study: its blocks hold a piece and what is said of it."""

from typing import Any

import torch
from tiny_models import SECTION

from transformerfam import FamConfig, convert
from transformerfam.study.options import StudyOptions
from transformerfam.training.tiny import build_tiny_model, build_tiny_tokenizer

STUDY_BLOCK = 64
TEXT = "The grass is green. The sky is blue. The pass key is 12345. Remember it. Here we go. " * 9
"""About 200 tokens: three blocks and a part of one."""
OPTIONS = {"piece_tokens": 16, "answer_tokens": 6, "pieces_per_step": 2, "pool": 2, "uses": 2, "evaluate_every": 2}
SMALL = StudyOptions(**OPTIONS, num_held_out=2, warmup_steps=2)


def make_study_model(preset: str = "gated", **changes: Any) -> tuple[Any, Any]:
    """Make a converted model whose vocabulary is that of the passkey text, and its tokenizer."""
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(SECTION, len(tokenizer)).eval()
    with torch.no_grad():  # small embeddings, so that attention, and with it the memory, shows in the answers
        model.get_input_embeddings().weight.mul_(0.05)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(10.0)
    shape = {"block_size": STUDY_BLOCK, "fam_length": 3, "num_memory_segments": 0, "fam_key_bias": 0.0}
    return convert(model, FamConfig.preset(preset, **shape | changes)), tokenizer
