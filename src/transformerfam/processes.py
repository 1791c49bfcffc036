"""Processes: how one ends, and which of several it is, as `accelerate launch` or torchrun say in the environment."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C, SIGTERM or SIGHUP ended, once it has saved what it had."""

SETTLE_SECONDS = 1.0
"""How long after Ctrl-C another one is the same one: of a key that is held, or of two processes that both send it."""

END_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def process_share() -> tuple[int, int]:
    """Return this process's number, from 0, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """Return the device of this process: of several on one machine each takes its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def end_with_input() -> None:
    """End this process as SIGTERM does when standard input ends: the process at its other end is gone then."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def ends_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt in the body, as Ctrl-C does, unless they are ignored.

    What follows within `SETTLE_SECONDS` is dropped, so that the work done can be saved and reported.
    """
    last = [float("-inf")]

    def interrupt(number: int, frame: FrameType | None) -> None:
        before, last[0] = last[0], time.monotonic()
        if last[0] - before >= SETTLE_SECONDS:
            raise KeyboardInterrupt

    plain = (signal.SIG_DFL, signal.default_int_handler)
    with _handlers({n: interrupt for n in END_SIGNALS if signal.getsignal(n) in plain}):
        yield


@contextlib.contextmanager
def ends_noted() -> Iterator[list[int]]:
    """Yield a list of what came of Ctrl-C, SIGTERM and SIGHUP, for a body that ends itself; a second Ctrl-C ends it.

    One that follows another within `SETTLE_SECONDS` is the same one.
    """
    noted: list[int] = []
    last = [float("-inf")]
    plain = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        before, last[0] = last[0], time.monotonic()
        is_second = number in noted and last[0] - before >= SETTLE_SECONDS
        if is_second and number == signal.SIGINT and callable(plain):
            plain(number, frame)
        noted.append(number)

    with _handlers({n: note for n in END_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}):
        yield noted


@contextlib.contextmanager
def uninterrupted(and_forgotten: bool = False) -> Iterator[None]:
    """Let Ctrl-C, and whatever else has a handler, wait until the body is done: it is done whole or not begun.

    Args:
        and_forgotten: drop what came meanwhile, where the process ends after the body all the same.
    """
    caught: list[tuple[int, FrameType | None]] = []
    before = {n: handler for n in END_SIGNALS if callable(handler := signal.getsignal(n))}
    try:
        with _handlers(dict.fromkeys(before, lambda number, frame: caught.append((number, frame)))):
            yield
    finally:
        if caught and not and_forgotten:
            number, frame = caught[0]
            before[number](number, frame)


@contextlib.contextmanager
def _handlers(handlers: dict[Any, Any]) -> Iterator[None]:
    """Set signal handlers for the body; only the main thread can, and elsewhere no signal is handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
