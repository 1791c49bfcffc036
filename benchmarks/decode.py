"""How fast is decoding after a long text? Tokens per second after 1k, 32k and 256k tokens were read."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import base_model, converted, random_tokens
from benchmarks.placement import PLACEMENT
from benchmarks.prefill import build as build_prefill
from benchmarks.prefill import why_skipped
from transformerfam.fam.compiled import compile_decoding
from transformerfam.fam.state import FamState

BLOCK_SIZE, FAM_LENGTH = 1024, 64
LENGTHS = (1024, 32768, 262144)
NUM_NEW, TOGETHER = 32, 8
OWN = ("fam", "fam_compiled", "fam_int8_compiled", "fam_int8_torchao")
LLAMA_CPP = ("llama_cpp_float32", "llama_cpp_float32_flash", "llama_cpp_int8", "llama_cpp_int8_flash")
Step = Callable[[], None]


class Int8Linear(nn.Module):
    """Matrix product with weights in int8, one scale per output; one row at a time it is compiled without unpacking."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply `(..., in)` to `(..., out)`."""
        if rows.numel() == rows.shape[-1]:
            return (rows[..., None, :] * self.weight.float()).sum(-1) * self.scale
        return nn.functional.linear(rows, self.weight.float()) * self.scale


def with_int8_weights(model: Any) -> Any:
    """Replace all linear layers, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear(module))
    model.lm_head.compile(dynamic=False)  # it is outside the compiled layers
    return model


def with_torchao_int8_weights(model: Any) -> Any:
    """Quantize with torchao, in place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def fam_step(reader: nn.Module, state: FamState, new_ids: torch.Tensor) -> Step:
    """Return what decodes `NUM_NEW` tokens after a reading."""

    def step() -> None:
        for token in new_ids.split(1, dim=1):
            reader(input_ids=token, past_key_values=state, logits_to_keep=1)

    return step


def full_step(base: nn.Module, ids: torch.Tensor, new_ids: torch.Tensor) -> Step:
    """Return what decodes after a text in transformers' full cache."""
    cache = DynamicCache(config=base.config)
    base(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    def step() -> None:
        for token in new_ids.split(1, dim=1):
            base(input_ids=token, past_key_values=cache, logits_to_keep=1)

    return step


def llama_cpp_step(name: str, ids: torch.Tensor, new_ids: torch.Tensor) -> Step:
    """Return what decodes after a text in llama.cpp's full cache; the name, one of `LLAMA_CPP`, says how."""
    from benchmarks.llama_cpp import LlamaCpp

    reader = LlamaCpp(ids.shape[1] + 64 * NUM_NEW, is_int8="int8" in name, uses_flash_attention="flash" in name)
    reader.read(ids[0].tolist())

    def step() -> None:
        for token in new_ids[0].tolist():
            reader.read([token])

    return step


@torch.no_grad()
def run(
    model: str = "smollm2", repeats: int = 7, quick: bool = False, lengths: Sequence[int] = LENGTHS
) -> Iterator[Row]:
    """Decode after texts of growing length with every system in turn; of llama.cpp's settings only the best is kept."""
    fields = {"block_size": BLOCK_SIZE, "fam_length": FAM_LENGTH, "num_memory_segments": 0}
    own = [name for name in OWN if "int8" not in name or PLACEMENT.is_cpu]
    readers = {name: converted(model, is_shared="int8" not in name, **fields) for name in own}
    compile_decoding(readers["fam_compiled"])
    if PLACEMENT.is_cpu:
        compile_decoding(with_int8_weights(readers["fam_int8_compiled"]))
        try:
            with_torchao_int8_weights(readers["fam_int8_torchao"])
        except ImportError:
            del readers["fam_int8_torchao"]
            reason = "torchao is not installed: pip install torchao"
            yield row("decode", system="fam_int8_torchao", model=model, skipped=reason)
    full = build_prefill(model, "full")
    with_full_cache = ["full", *(LLAMA_CPP if model == "smollm2" and PLACEMENT.is_cpu else ())]
    for num_tokens in lengths[:1] if quick else lengths:
        ids, new_ids = random_tokens(model, num_tokens), random_tokens(model, NUM_NEW, seed=1)
        state = readers["fam"].read(ids)
        sides = {name: fam_step(reader, state.fork(), new_ids) for name, reader in readers.items()}
        sides["fam_together"] = fam_step(readers["fam"], state.select([0] * TOGETHER), new_ids.expand(TOGETHER, -1))
        for name in with_full_cache:
            reason = why_skipped(full, num_tokens, PLACEMENT.expected_flops_per_second)
            if reason is None:
                try:
                    if name == "full":
                        sides[name] = full_step(base_model(model), ids, new_ids)
                    else:
                        sides[name] = llama_cpp_step(name, ids, new_ids)
                    continue
                except ImportError:
                    reason = "llama-cpp-python is not installed: pip install llama-cpp-python"
            yield row("decode", system=name, model=model, num_tokens=num_tokens, skipped=reason)
        seconds = alternate(sides, repeats)
        for name, times in seconds.items():
            batch_size = TOGETHER if name == "fam_together" else 1
            yield row(
                "decode",
                system=name,
                model=model,
                num_tokens=num_tokens,
                batch_size=batch_size,
                **(fields if name.startswith("fam") else {}),
                **spread("tokens_per_second", [batch_size * NUM_NEW / s for s in times]),
                **spread("ratio", ratios(times, seconds["fam"])),
            )
        for weights in ("llama_cpp_float32", "llama_cpp_int8"):
            settings = [name for name in with_full_cache if name.startswith(weights)]
            best = min(settings, key=lambda name: min(seconds.get(name, [0.0])), default=None)
            with_full_cache = [name for name in with_full_cache if name not in settings or name == best]
