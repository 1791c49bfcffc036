"""The states that were used last, in RAM within a budget of bytes; all of them are in the store, too."""

import collections
import threading
from collections.abc import Iterable

from transformerfam.fam.state import FamState


class StateCache:
    """Keep states by memory and version, and let those go that were used longest ago.

    Args:
        budget_bytes: bytes of states at most.

    Attributes:
        num_hits: states that were there when they were looked for.
        num_misses: states that were not.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_hits = 0
        self.num_misses = 0
        self._states: collections.OrderedDict[str, tuple[str, FamState]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def num_bytes(self) -> int:
        """Bytes of the states that are kept."""
        with self._lock:
            return sum(state.num_bytes for _, state in self._states.values())

    def get(self, memory: str, version: str) -> FamState | None:
        """Return a copy of a memory's state, if this version of it is here."""
        with self._lock:
            found = self._states.get(memory)
            if found is None or found[0] != version:
                self.num_misses += 1
                return None
            self.num_hits += 1
            self._states.move_to_end(memory)
        return found[1].fork()

    def put(self, memory: str, version: str, state: FamState) -> None:
        """Keep a state, which is the cache's from now on; one that is larger than the budget is not kept."""
        state.compact()
        with self._lock:
            self._states.pop(memory, None)
            self._states[memory] = version, state
            total = sum(kept.num_bytes for _, kept in self._states.values())
            while self._states and total > self.budget_bytes:
                _, (_, oldest) = self._states.popitem(last=False)
                total -= oldest.num_bytes

    def keep(self, memories: Iterable[str]) -> None:
        """Forget the states of all other memories."""
        kept = set(memories)
        with self._lock:
            for memory in [memory for memory in self._states if memory not in kept]:
                del self._states[memory]

    def drop(self, memory: str) -> None:
        """Forget a memory's state."""
        with self._lock:
            self._states.pop(memory, None)
