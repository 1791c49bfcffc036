"""Alternating timings on one machine, and the rows that they become."""

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import transformers

from benchmarks.placement import PLACEMENT, place
from transformerfam.cli.demo import peak_memory, reset_peak_memory
from transformerfam.tasks.provenance import machine, provenance

Row = dict[str, Any]
Side = Callable[[], Any]
MOST_SECONDS, MOST_OF_MEMORY = 600.0, 0.8


def alternate(sides: Mapping[str, Side], repeats: int, warm_ups: int = 1) -> dict[str, list[float]]:
    """Run the sides in turn, A B A B ..., so that a machine that slows down slows all of them.

    Returns:
        The seconds of every counted run, by side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_idx in range(warm_ups + repeats):
        for name, side in sides.items():
            gc.collect()
            PLACEMENT.synchronize()
            start = time.perf_counter()
            side()
            PLACEMENT.synchronize()
            elapsed = time.perf_counter() - start
            if round_idx >= warm_ups:
                seconds[name].append(elapsed)
    return seconds


def spread(name: str, values: Sequence[float]) -> Row:
    """Return median, smallest and largest of `values` as the fields `name_median`, `name_min` and `name_max`."""
    return {
        f"{name}_median": statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratio of every pair of adjacent runs."""
    return [a / b for a, b in zip(over, under, strict=True)]


def row(figure: str, **fields: Any) -> Row:
    """Return a row with what every row carries: where, on how many threads, and with which versions."""
    return {
        "task": "benchmark",
        "figure": figure,
        **fields,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **provenance(),
        "machine": PLACEMENT.describe(machine()),
    }


def peak_bytes_of(side: Side) -> int:
    """Run a side and return how far memory rose above what was there before, in bytes: resident, or the device's."""
    gc.collect()
    if not PLACEMENT.is_cpu:
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(PLACEMENT.device)
        before = torch.accelerator.memory_allocated(PLACEMENT.device)
        side()
        return torch.accelerator.max_memory_allocated(PLACEMENT.device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else what loading freed would hide what the side takes
    reset_peak_memory()
    before = peak_memory()
    side()
    return max(0, peak_memory() - before)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, computed in a separate process, so that memory is that of this call alone."""
    context = multiprocessing.get_context("spawn")
    initial = (torch.get_num_threads(), PLACEMENT.device, PLACEMENT.dtype)
    with ProcessPoolExecutor(1, context, initializer=_set_up, initargs=initial) as pool:
        return pool.submit(function, *arguments).result()


def _set_up(num_threads: int, device: torch.device, dtype: torch.dtype) -> None:
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)
    place(device, dtype)


def predicted_excess(num_bytes: float, seconds: float | None) -> str | None:
    """Return why a cell that needs so much would be skipped, or None; None seconds are not known yet."""
    there = PLACEMENT.available_bytes()
    if num_bytes > MOST_OF_MEMORY * there:
        share = f"{MOST_OF_MEMORY:.0%} of the {there / 1e9:.1f} GB that are available"
        return f"predicted to need {num_bytes / 1e9:.1f} GB, over {share}"
    if seconds is not None and seconds > MOST_SECONDS:
        return f"predicted to take {seconds:.0f} s, over {MOST_SECONDS:.0f} s"
    return None
