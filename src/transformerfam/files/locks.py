"""Locks: one writer for a folder or a file, released by the end of the process however it ends."""

import os
import time
from typing import IO

from filelock import BaseFileLock, FileLock, Timeout, lock_descriptor

from transformerfam.errors import TransformerFamError

LOCK_SECONDS = 10.0
"""How long a process that is about to end is waited for."""


def hold(path: str | os.PathLike[str], what: str) -> BaseFileLock:
    """Take a lock, which the end of the process releases however it ends.

    Args:
        path: the lock's file; it stays.
        what: what the lock is of, for the message.

    Raises:
        TransformerFamError: another process holds it and does not end within `LOCK_SECONDS`, or no file can be made.
    """
    lock = FileLock(path, timeout=LOCK_SECONDS, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise in_use(what) from error
    except OSError as error:
        raise TransformerFamError(f"could not write {path}: {error.strerror}; choose another folder") from error
    return lock


def hold_shared(path: str | os.PathLike[str], what: str) -> IO[bytes]:
    """Return an open file that keeps `hold` from a lock until it is closed, and lets others do the same meanwhile.

    Arguments and errors are those of `hold`.
    """
    try:
        import fcntl
    except ImportError as error:
        raise TransformerFamError(f"{what} cannot be shared on this system; use Linux or macOS") from error
    end = time.monotonic() + LOCK_SECONDS
    try:
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise TransformerFamError(f"could not write {path}: {error.strerror}; choose another folder") from error
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                raise in_use(what) from None
            time.sleep(0.1)


def hold_file(file: IO[bytes], what: str) -> None:
    """Lock an open file until it is closed; arguments and errors are those of `hold`."""
    end = time.monotonic() + LOCK_SECONDS
    while not lock_descriptor(file.fileno(), blocking=False):
        if time.monotonic() >= end:
            raise in_use(what)
        time.sleep(0.1)


def in_use(what: str) -> TransformerFamError:
    """Return the error of something that another process writes."""
    return TransformerFamError(f"{what} is written by another process; wait until it ends, or choose another")
