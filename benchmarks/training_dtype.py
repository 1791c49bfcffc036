"""What does training with frozen weights in bfloat16 gain, and how near are its gradients? LoRA, against float32."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import converted, random_tokens
from transformerfam.config import UPDATE_PRESETS
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.training.data.instructions import weighed_batch
from transformerfam.training.lora import fuse_lora
from transformerfam.training.step.blocks import run_batch
from transformerfam.weights.adapter import inject_lora
from transformerfam.weights.models import NAMED_MODELS, load_model

DTYPES = ("float32", "bfloat16")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINED = "trained"
"""What rows call the memory that comes with the package."""


def trainee(model: str, update: str, fields: dict[str, Any]) -> Any:
    """Return a model with LoRA in float32: converted with a preset of the update, or the trained memory."""
    torch.manual_seed(0)
    if update == TRAINED:
        return load_model(model, config_overrides=fields, merge=False)[0].float().train()
    reader = converted(model, is_shared=False, **UPDATE_PRESETS[update], **fields).float().train()
    inject_lora(reader, LoraConfig(r=16, lora_alpha=32.0, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in reader.named_parameters():
        if "lora_B" in name:  # a first factor whose second is zero has no gradient
            parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return reader


def lora_steps(reader: Any, ids_BT: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what runs one step's forward and backward and gives all gradients, one after the other."""
    fuse_lora(reader)
    batch = weighed_batch(ids_BT, torch.ones(ids_BT.shape))
    trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]

    def step() -> torch.Tensor:
        reader.zero_grad(set_to_none=True)
        run_batch(reader, batch, reader.init_state()).loss.backward()
        return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])

    return step


def run(model: str = "smollm2", repeats: int = 5, quick: bool = False) -> Iterator[Row]:
    """Train LoRA on five blocks in both types in turn, and compare the gradients of one step.

    `gradient_distance` is that of bfloat16 from float32, `gradient_distance_rounded` that of float32 products whose
    frozen weights were rounded to bfloat16: which no arithmetic can restore.
    """
    block_size, fam_length = (16, 4) if quick else (256, 16)
    fields = {"block_size": block_size, "fam_length": fam_length, "num_memory_segments": 1}
    num_tokens = 5 * block_size
    ids_BT = random_tokens(model, num_tokens)
    updates = ("paper", "gated") if quick else (*UPDATE_PRESETS, *([TRAINED] if model in NAMED_MODELS else []))
    for update in updates:
        lengths = fields if update != TRAINED else {"block_size": block_size}
        readers = {name: trainee(model, update, lengths) for name in (*DTYPES, "rounded")}
        for name in ("bfloat16", "rounded"):
            hold_weights_in("bfloat16", readers[name], only_frozen=True)
        hold_weights_in("float32", readers["rounded"], only_frozen=True)
        steps = {name: lora_steps(reader, ids_BT) for name, reader in readers.items()}
        found = {name: step() for name, step in steps.items()}
        distance = {name: float((found[name] - found["float32"]).norm() / found["float32"].norm()) for name in found}
        seconds = alternate({dtype: steps[dtype] for dtype in DTYPES}, 1 if quick else repeats)
        for dtype in DTYPES:
            yield row(
                "training_dtype",
                model=model,
                system="fam",
                fam_update=update,
                frozen_dtype=dtype,
                **{name: getattr(readers[dtype].fam_config, name) for name in fields},
                num_tokens=num_tokens,
                **spread("tokens_per_second", [num_tokens / s for s in seconds[dtype]]),
                **spread("ratio", ratios(seconds["float32"], seconds[dtype])),
                gradient_distance=distance[dtype],
                gradient_distance_rounded=distance["rounded"],
            )
