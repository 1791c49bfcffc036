"""States of memories: loaded from the store, checked against the model, and kept in RAM as long as there is room."""

from pathlib import Path
from typing import Any

import torch

from transformerfam.errors import CorruptFileError, StateMismatchError
from transformerfam.fam.state import OLDER_VERSIONS, STATE_FORMAT_VERSION, FamState
from transformerfam.files.tensors import load_tensors
from transformerfam.serving.cache import StateCache
from transformerfam.serving.errors import ApiError
from transformerfam.serving.records import Record, fingerprint_of
from transformerfam.serving.store import Store


class States:
    """States of one model.

    Args:
        store: where they are.
        model: that reads them.
        budget_bytes: bytes of states in RAM at most.

    Attributes:
        cache: those in RAM.
        fingerprint: of the model; see `fingerprint_of`.
    """

    def __init__(self, store: Store, model: Any, budget_bytes: int) -> None:
        self.store = store
        self.model = model
        self.cache = StateCache(budget_bytes)
        self.fingerprint = fingerprint_of(model)
        with torch.no_grad():
            self._blank = model.init_state().compact()

    def blank(self) -> FamState:
        """Return a state that has read nothing."""
        return self._blank.fork()

    def of(self, record: Record) -> FamState:
        """Return a copy of a memory's state.

        Raises:
            ApiError: 409, it is not read yet or of other weights; 503, the store cannot be reached.
        """
        if record.state is None:
            why = f" ({record.error})" if record.error else ""
            raise ApiError(
                409,
                f"memory {record.id} is {record.status}{why}; wait until its status is ready, or read the text again",
                "memory_not_ready",
                "memory",
                2,
            )
        self.require_own_weights(record)
        found = self.cache.get(record.id, record.state)
        if found is not None:
            return found
        state = self.from_store(record, record.state)
        self.cache.put(record.id, record.state, state.fork())
        return state

    def from_store(self, record: Record, name: str) -> FamState:
        """Return the state of one of a memory's files; errors as `load`, and 503."""
        with self.store.local_file(record.owner, record.id, name) as path:
            return self.load(path)

    def load(self, path: Path) -> FamState:
        """Load the file of a state of this model's weights.

        Raises:
            ApiError: 409, other weights have read it; 400, it is none of this model.
        """
        try:
            _, metadata = load_tensors(path, "state", STATE_FORMAT_VERSION, OLDER_VERSIONS)
            own, there = self._blank.identity_metadata(), metadata.get("identity")
            parts = ("base_digest", "memory_digest")
            if isinstance(there, dict) and any(own[part] != there.get(part) for part in parts):
                raise ApiError(
                    409, "the state was read by other weights or another adapter; read the text again", "read_again"
                )
            return FamState.load(path, self.model, batch_size=1)
        except (CorruptFileError, StateMismatchError) as error:
            message = str(error).replace(str(path), "the state's file")
            raise ApiError(400, message, "invalid_state") from error

    def require_own_weights(self, record: Record) -> None:
        """Refuse a memory that other weights have read.

        Raises:
            ApiError: 409.
        """
        if record.fingerprint != self.fingerprint:
            raise ApiError(
                409,
                f"memory {record.id} was read by other weights, another adapter or configuration (fingerprint "
                f"{record.fingerprint} there, {self.fingerprint} here); read the text again into a new memory",
                "read_again",
                "memory",
            )
