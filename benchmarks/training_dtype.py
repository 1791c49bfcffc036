"""What does training with frozen weights in bfloat16 gain, and how near are its gradients? LoRA, beside float32."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import converted, random_tokens
from transformerfam.adapter import inject_lora
from transformerfam.config import UPDATE_PRESETS
from transformerfam.training.blocks import run_batch
from transformerfam.training.instructions import weighed_batch
from transformerfam.training.lora import fuse_lora
from transformerfam.training.setup import hold_frozen_weights_in

DTYPES = ("float32", "bfloat16")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_steps(model: str, dtype: str, num_tokens: int, fields: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Return what runs one step's forward and backward and gives all gradients, one after the other."""
    torch.manual_seed(0)
    reader = converted(model, is_shared=False, **fields).float().train()
    inject_lora(reader, LoraConfig(r=16, lora_alpha=32.0, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in reader.named_parameters():
        if "lora_B" in name:  # a first factor whose second is zero has no gradient
            parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    if dtype != "float32":
        hold_frozen_weights_in(getattr(torch, dtype), reader)
    fuse_lora(reader)
    ids_BT = random_tokens(model, num_tokens)
    batch = weighed_batch(ids_BT, torch.ones(ids_BT.shape))
    trained = [parameter for parameter in reader.parameters() if parameter.requires_grad]

    def step() -> torch.Tensor:
        reader.zero_grad(set_to_none=True)
        run_batch(reader, batch, reader.init_state()).loss.backward()
        return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])

    return step


def run(model: str = "smollm2", repeats: int = 5, quick: bool = False) -> Iterator[Row]:
    """Train LoRA on five blocks in both types in turn, and compare the gradients of one step."""
    block_size, fam_length = (64, 4) if quick else (256, 16)
    fields = {"block_size": block_size, "fam_length": fam_length, "num_memory_segments": 1}
    num_tokens = 5 * block_size
    for update, values in UPDATE_PRESETS.items():
        steps = {dtype: lora_steps(model, dtype, num_tokens, values | fields) for dtype in DTYPES}
        expected, found = (steps[dtype]() for dtype in DTYPES)
        distance = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
        seconds = alternate(steps, 1 if quick else repeats)
        for dtype in DTYPES:
            yield row(
                "training_dtype",
                model=model,
                system="fam",
                fam_update=update,
                frozen_dtype=dtype,
                **fields,
                num_tokens=num_tokens,
                **spread("tokens_per_second", [num_tokens / s for s in seconds[dtype]]),
                **spread("ratio", ratios(seconds["float32"], seconds[dtype])),
                gradient_distance=0.0 if dtype == "float32" else distance,
            )
