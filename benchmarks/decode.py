"""How fast is decoding behind a long text? Tokens per second after 1k, 32k and 256k tokens were read."""

from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache

from benchmarks.harness import Row, alternate, ratios, row, spread
from benchmarks.models import base_model, converted, random_tokens
from benchmarks.prefill import build as build_prefill
from benchmarks.prefill import why_skipped
from transformerfam.state import FamState

BLOCK_SIZE, FAM_LENGTH = 1024, 64
LENGTHS = (1024, 32768, 262144)
NUM_NEW = 32
Step = Callable[[], None]


def quantized(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with its matrices in int8, one scale per output, in place."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def fam_step(reader: torch.nn.Module, state: FamState, new_ids: torch.Tensor) -> Step:
    """Return what decodes `NUM_NEW` tokens behind a reading."""

    def step() -> None:
        for token in new_ids.split(1, dim=1):
            reader(input_ids=token, past_key_values=state, logits_to_keep=1)

    return step


def full_step(base: torch.nn.Module, ids: torch.Tensor, new_ids: torch.Tensor) -> Step:
    """Return what decodes behind a text in transformers' full cache."""
    cache = DynamicCache(config=base.config)
    base(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    def step() -> None:
        for token in new_ids.split(1, dim=1):
            base(input_ids=token, past_key_values=cache, logits_to_keep=1)

    return step


def llama_cpp_step(ids: torch.Tensor, new_ids: torch.Tensor, is_int8: bool, uses_flash_attention: bool) -> Step:
    """Return what decodes behind a text in llama.cpp's full cache."""
    from benchmarks.llama_cpp import LlamaCpp

    reader = LlamaCpp(ids.shape[1] + 64 * NUM_NEW, is_int8, uses_flash_attention)
    reader.read(ids[0].tolist())

    def step() -> None:
        for token in new_ids[0].tolist():
            reader.read([token])

    return step


@torch.no_grad()
def run(model: str = "smollm2", repeats: int = 7, quick: bool = False) -> Iterator[Row]:
    """Decode behind texts of three lengths with every system in turn."""
    fields = {"block_size": BLOCK_SIZE, "fam_length": FAM_LENGTH, "num_memory_segments": 0}
    reader = converted(model, **fields)
    full = build_prefill(model, "full")
    for num_tokens in LENGTHS[:1] if quick else LENGTHS:
        ids, new_ids = random_tokens(model, num_tokens), random_tokens(model, NUM_NEW, seed=1)
        state = reader.read(ids)
        sides: dict[str, Step] = {"fam": fam_step(reader, state, new_ids)}
        builders: dict[str, Callable[[], Step]] = {
            "full": lambda ids=ids, new_ids=new_ids: full_step(base_model(model), ids, new_ids)
        }
        try:
            small = quantized(converted(model, is_shared=False, **fields))
            sides["fam_int8"] = fam_step(small, state.fork(), new_ids)
        except ImportError:
            yield row("decode", system="fam_int8", model=model, skipped="torchao is not installed: pip install torchao")
        if model == "smollm2":
            for is_int8 in (False, True):
                for flash in (False, True):
                    name = f"llama_cpp{'_int8' if is_int8 else ''}{'_flash' if flash else ''}"
                    builders[name] = lambda i=ids, n=new_ids, q=is_int8, f=flash: llama_cpp_step(i, n, q, f)
        for name, build in builders.items():
            reason = why_skipped(full, num_tokens, FULL_FLOPS_PER_SECOND)
            if reason is not None:
                yield row("decode", system=name, model=model, num_tokens=num_tokens, skipped=reason)
                continue
            try:
                sides[name] = build()
            except ImportError:
                reason = "llama-cpp-python is not installed: pip install llama-cpp-python"
                yield row("decode", system=name, model=model, num_tokens=num_tokens, skipped=reason)
        seconds = alternate(sides, repeats)
        for name, times in seconds.items():
            yield row(
                "decode",
                system=name,
                model=model,
                num_tokens=num_tokens,
                **(fields if name.startswith("fam") else {}),
                **spread("tokens_per_second", [NUM_NEW / s for s in times]),
                **spread("ratio", ratios(times, seconds["fam"])),
            )


FULL_FLOPS_PER_SECOND = 1e11
"""What reading with a full cache is expected to reach: only whether a cell takes over 10 minutes depends on it."""
