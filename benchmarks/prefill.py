"""How fast is reading, and does it stay so? Tokens per second, memory and carried bytes against length."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from benchmarks.harness import Row, alternate, in_fresh_process, peak_bytes_of, predicted_excess, row, spread
from benchmarks.models import base_model, converted, random_tokens
from benchmarks.placement import PLACEMENT
from transformerfam.fam.compiled import compile_reading
from transformerfam.tools.costs import ModelShape, block_flops, full_attention_flops, sliding_window_flops

BLOCK_SIZE, FAM_LENGTH, NUM_SEGMENTS = 1024, 64, 0
LENGTHS = tuple(1024 * 2**i for i in range(9))
REPEATED_TO = 16384


@dataclass(frozen=True)
class System:
    """A way to read: what reads, and what it is expected to cost.

    Attributes:
        read: takes token ids `(1, T)` and returns what is carried on.
        flops: operations for T tokens.
        bytes_carried: bytes of what is carried on after T tokens.
        bytes_working: further bytes while T tokens are read.
    """

    read: Callable[[torch.Tensor], Any]
    flops: Callable[[int], float]
    bytes_carried: Callable[[int], int]
    bytes_working: Callable[[int], int]


OWN: dict[str, dict[str, int]] = {
    "fam": {"fam_length": FAM_LENGTH, "num_memory_segments": NUM_SEGMENTS},
    "bswa": {"fam_length": 0, "num_memory_segments": NUM_SEGMENTS},
    "attention_sinks": {"fam_length": 0, "num_memory_segments": 1, "num_sink_tokens": 4},
}
SYSTEMS = (*OWN, "sliding_window", "full")
COMPILED = "fam_compiled"


def systems() -> tuple[str, ...]:
    """Return what is compared: compiled reading too, where Python is slower than the device."""
    return SYSTEMS if PLACEMENT.is_cpu else (COMPILED, *SYSTEMS)


def build(model: str, name: str) -> System:
    """Return one of `systems()`: FAM, BSWA and sinks of this package, transformers' sliding-window and full cache."""
    base = base_model(model)
    shape = ModelShape.of(base.config)
    size = BLOCK_SIZE
    num_bytes = PLACEMENT.dtype.itemsize
    per_row = num_bytes * (8 * shape.hidden_size + 3 * shape.intermediate_size)  # activations alive at once
    if name in OWN or name == COMPILED:
        reader = converted(model, block_size=size, **OWN["fam" if name == COMPILED else name])
        if name == COMPILED:
            compile_reading(reader)
        return System(
            reader.read,
            lambda n: n / size * block_flops(shape, reader.fam_config),
            lambda n: reader.init_state().num_bytes,
            lambda n: size * per_row,
        )
    if name == "full":

        def read_full(ids: torch.Tensor) -> DynamicCache:
            cache = DynamicCache(config=base.config)
            base(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            return cache

        return System(
            read_full,
            lambda n: full_attention_flops(shape, n),
            lambda n: num_bytes * shape.cache_elements(n),
            lambda n: n * per_row,
        )
    sliding = _sliding_window_model(model)

    def read_sliding(ids: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=sliding.config)
        for part in ids.split(size, dim=1):
            sliding(input_ids=part, past_key_values=cache, logits_to_keep=1)
        return cache

    return System(
        read_sliding,
        lambda n: sliding_window_flops(shape, n, size),
        lambda n: num_bytes * shape.cache_elements(n, window=size),
        lambda n: size * per_row,
    )


def _sliding_window_model(model: str) -> Any:
    """Return the same weights as a Mistral, the family of the same layers whose cache and mask slide."""
    base = base_model(model)
    fields = base.config.to_dict()
    names = MistralConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = MistralConfig(**{name: fields[name] for name in names if name in fields}, attn_implementation="sdpa")
    config.sliding_window = BLOCK_SIZE
    sliding = MistralForCausalLM(config).eval()
    sliding.load_state_dict(copy.copy(base.state_dict()))
    return sliding.to(PLACEMENT.device, PLACEMENT.dtype)


def carried_bytes(carried: Any) -> int:
    """Return the bytes of a `FamState` or a transformers cache."""
    if hasattr(carried, "num_bytes"):
        return carried.num_bytes
    tensors = [t for layer in carried.layers for t in (layer.keys, layer.values)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def why_skipped(system: System, num_tokens: int, flops_per_second: float | None) -> str | None:
    """Return why a cell would take too long or too much memory, or None."""
    num_bytes = system.bytes_carried(num_tokens) + system.bytes_working(num_tokens)
    return predicted_excess(num_bytes, system.flops(num_tokens) / flops_per_second if flops_per_second else None)


def measure_alone(model: str, name: str, num_tokens: int) -> tuple[float, int, int]:
    """Build a system and `measure_once`."""
    return measure_once(build(model, name), random_tokens(model, num_tokens))


@torch.no_grad()
def measure_once(system: System, ids: torch.Tensor) -> tuple[float, int, int]:
    """Return the seconds that one reading takes, the bytes by which memory rises, and those carried on."""
    system.read(ids[:, : 2 * BLOCK_SIZE])
    PLACEMENT.synchronize()
    carried, seconds = [], []

    def timed() -> None:
        start = time.perf_counter()
        carried.append(system.read(ids))
        PLACEMENT.synchronize()
        seconds.append(time.perf_counter() - start)

    peak = peak_bytes_of(timed)
    return seconds[0], peak, carried_bytes(carried[0])


@torch.no_grad()
def run(
    model: str = "smollm2", repeats: int = 5, quick: bool = False, lengths: Sequence[int] = LENGTHS
) -> Iterator[Row]:
    """Read texts of growing length with every system in turn; long ones once, in a separate process."""
    compared = {name: build(model, name) for name in systems()}
    speeds: dict[str, float] = {}  # operations per second at the last length
    for num_tokens in lengths[:2] if quick else lengths:
        ids = random_tokens(model, num_tokens)
        sides = {}
        for name, system in compared.items():
            reason = why_skipped(system, num_tokens, speeds.get(name, PLACEMENT.expected_flops_per_second))
            if reason is None:
                sides[name] = lambda read=system.read, ids=ids: read(ids)
            else:
                yield row("prefill", system=name, model=model, num_tokens=num_tokens, skipped=reason)
        seconds = alternate(sides, repeats) if num_tokens <= REPEATED_TO else {}
        for name in sides:
            once, peak, carried = (
                in_fresh_process(measure_alone, model, name, num_tokens)
                if PLACEMENT.is_cpu
                else measure_once(compared[name], ids)  # a device's allocator counts what a call takes
            )
            times = seconds.get(name, [once])
            speeds[name] = compared[name].flops(num_tokens) / min(times)
            yield row(
                "prefill",
                system=name,
                model=model,
                num_tokens=num_tokens,
                block_size=BLOCK_SIZE,
                **spread("tokens_per_second", [num_tokens / s for s in times]),
                **spread("seconds", times),
                bytes_peak=peak,
                bytes_carried=carried,
            )
