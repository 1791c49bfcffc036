"""Processes: how one ends, and which of several it is, as `accelerate launch` or torchrun say in the environment."""

import os

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, once it has saved what it had."""


def process_share() -> tuple[int, int]:
    """Return this process's number, from 0, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """Return the device of this process: of several on one machine each takes its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
