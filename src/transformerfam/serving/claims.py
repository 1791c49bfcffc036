"""Who changes what: at most one server changes a memory at a time, and one that is gone holds nothing.

A claim has a name: a memory's id, or another word. Whoever takes it has it until it is freed or its holder is gone.
`OwnClaims` are those of one server that has its store for itself, `FileClaims` those of several processes on one
machine, `LeasedClaims` those of servers anywhere, which a `LeaseTable` that all of them reach decides.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Collection
from pathlib import Path
from typing import IO, Protocol, Self

from filelock import lock_descriptor

from transformerfam.errors import TransformerFamError
from transformerfam.files.writing import make_folder
from transformerfam.serving.leases import LEASE_SECONDS
from transformerfam.serving.store import Store

BEATS = 4
"""How many times in these seconds a holder says that it is there."""


class Claims(Protocol):
    """What one server claims."""

    def take(self, name: str) -> bool:
        """Take a claim, and return whether nobody has it, this server included.

        Raises:
            Exception: it cannot be found out.
        """

    def free(self, name: str) -> None:
        """Let others have a claim; it waits for nothing."""

    def confirm(self, name: str) -> bool:
        """Return whether a claim that was taken is still this server's, and is for some seconds at least.

        Raises:
            Exception: it cannot be found out.
        """

    def close(self) -> None:
        """Free all."""


class OwnClaims:
    """Claims of the one server that has its store for itself."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def take(self, name: str) -> bool:
        """Take a claim; see `Claims`."""
        with self._lock:
            if name in self._names:
                return False
            self._names.add(name)
            return True

    def free(self, name: str) -> None:
        """Let others have a claim."""
        with self._lock:
            self._names.discard(name)

    def confirm(self, name: str) -> bool:
        """Return True: they end with the process alone."""
        return True

    def close(self) -> None:
        """Free all."""
        with self._lock:
            self._names.clear()


class FileClaims:
    """Claims of processes on one machine: files that are locked, which the end of a process frees however it ends.

    Args:
        folder: where the files are while they are locked.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        make_folder(folder)
        self._folder = Path(folder)
        self._files: dict[str, IO[bytes]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, store: Store) -> Self:
        """Return claims of a folder.

        Raises:
            TransformerFamError: the store is none.
        """
        if not store.is_local:
            raise TransformerFamError(
                f"the store is {store.url!r}, and only a folder is shared by processes of one machine; share another "
                "store by Ray Serve (docs/howto/serving_ray.md)"
            )
        return cls(store.path(".claims"))

    def take(self, name: str) -> bool:
        """Take a claim; see `Claims`."""
        path = self._folder / f"{name}.lock"
        while True:
            file = path.open("ab")
            if not lock_descriptor(file.fileno(), blocking=False):
                file.close()
                return False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
            file.close()  # its holder removed it between our opening and our locking

        with self._lock:
            self._files[name] = file
        return True

    def free(self, name: str) -> None:
        """Let others have a claim."""
        with self._lock:
            file = self._files.pop(name, None)
        if file is not None:
            (self._folder / f"{name}.lock").unlink(missing_ok=True)
            file.close()

    def confirm(self, name: str) -> bool:
        """Return whether this process has the claim, which nobody can take from it."""
        return name in self._files

    def close(self) -> None:
        """Free all."""
        for name in list(self._files):
            self.free(name)


class Table(Protocol):
    """What decides on the claims of many servers; `LeaseTable` says what the methods do."""

    def take(self, holder: str, name: str) -> bool: ...  # noqa: D102
    def free(self, holder: str, name: str) -> None: ...  # noqa: D102
    def confirm(self, holder: str, name: str) -> bool: ...  # noqa: D102
    def beat(self, holder: str, names: Collection[str]) -> None: ...  # noqa: D102
    def leave(self, holder: str) -> None: ...  # noqa: D102


class LeasedClaims:
    """Claims that a table decides on, which several servers reach.

    Args:
        table: it.
        lease_seconds: its lease.
    """

    def __init__(self, table: Table, lease_seconds: float = LEASE_SECONDS) -> None:
        self.table = table
        self.holder = secrets.token_hex(8)
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pause = lease_seconds / BEATS
        threading.Thread(target=self._run, name="claims", daemon=True).start()

    def take(self, name: str) -> bool:
        """Take a claim; see `Claims`."""
        with self._lock:
            if name in self._names:
                return False
            self._names.add(name)
        is_taken = False
        try:
            is_taken = self.table.take(self.holder, name)
        finally:
            if not is_taken:
                with self._lock:
                    self._names.discard(name)
        return is_taken

    def free(self, name: str) -> None:
        """Let others have a claim."""
        with self._lock:
            self._names.discard(name)
        self.table.free(self.holder, name)

    def confirm(self, name: str) -> bool:
        """Return whether a claim is still this server's; see `Claims`."""
        return self.table.confirm(self.holder, name)

    def beat(self) -> None:
        """Say that this server is there."""
        with self._lock:
            names = list(self._names)
        self.table.beat(self.holder, names)

    def close(self) -> None:
        """Free all."""
        self._ended.set()
        with contextlib.suppress(Exception):  # a table that is not reached frees them by itself
            self.table.leave(self.holder)

    def _run(self) -> None:
        while not self._ended.wait(self._pause):
            with contextlib.suppress(Exception):  # the next beat tries again; whoever changes a memory asks the table
                self.beat()
