"""The table of claims that several servers share. It imports nothing, so that an actor with it starts at once."""

import threading
import time
from collections.abc import Callable, Collection

LEASE_SECONDS = 20.0
"""Seconds after which a holder that says nothing holds nothing."""


class LeaseTable:
    """Who holds which claim; a holder of whom nothing is heard for some seconds loses all of them.

    Args:
        lease_seconds: these seconds.
        clock: gives the time in seconds.
    """

    def __init__(self, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease_seconds = lease_seconds
        self.clock = clock
        self._holders: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self, holder: str, name: str) -> bool:
        """Give a claim to a holder, and return whether no other one has it; asked twice the answer is the same."""
        with self._lock:
            self._hear(holder)
            return self._holders.setdefault(name, holder) == holder

    def free(self, holder: str, name: str) -> None:
        """Take a claim from its holder."""
        with self._lock:
            if self._holders.get(name) == holder:
                del self._holders[name]

    def confirm(self, holder: str, name: str) -> bool:
        """Return whether a holder has a claim; if so, it does for the seconds of a lease at least."""
        with self._lock:
            self._hear(holder)
            return self._holders.get(name) == holder

    def beat(self, holder: str, names: Collection[str]) -> None:
        """Note that a holder is there; claims of its that this table has lost, and nobody has taken, are its again."""
        with self._lock:
            self._hear(holder)
            for name in names:
                self._holders.setdefault(name, holder)

    def leave(self, holder: str) -> None:
        """Forget a holder and its claims."""
        with self._lock:
            self._forget({holder})

    def _hear(self, holder: str) -> None:
        now = self.clock()
        self._forget({one for one, heard in self._heard.items() if now - heard >= self.lease_seconds})
        self._heard[holder] = now

    def _forget(self, holders: set[str]) -> None:
        if holders:
            self._heard = {one: heard for one, heard in self._heard.items() if one not in holders}
            self._holders = {name: holder for name, holder in self._holders.items() if holder not in holders}
