"""Memories by their owners: what there is, who works on it, and how a new state takes the old one's place."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from transformerfam.errors import CorruptFileError, StateMismatchError
from transformerfam.fam.state import OLDER_VERSIONS, STATE_FORMAT_VERSION, FamState
from transformerfam.files.tensors import load_tensors
from transformerfam.serving.cache import StateCache
from transformerfam.serving.errors import ApiError
from transformerfam.serving.records import NO_PARTIAL, NUM_KEYS, READING, READY, Record, fingerprint_of, new_id
from transformerfam.serving.store import Store


class Memories:
    """All memories of a server.

    Args:
        store: where they are kept.
        model: that reads them.
        model_name: what it is called.
        budget_bytes: bytes of states in RAM at most.
        clock: gives the time in seconds since 1970.

    Raises:
        ApiError: the store cannot be reached.
    """

    def __init__(
        self, store: Store, model: Any, model_name: str, budget_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.model = model
        self.model_name = model_name
        self.cache = StateCache(budget_bytes)
        self.clock = clock
        self.fingerprint = fingerprint_of(model)
        with torch.no_grad():
            self._blank = model.init_state().compact()
        self._lock = threading.RLock()
        self._busy: set[str] = set()
        self._writing: dict[str, threading.RLock] = {}
        self._records = {record.id: record for record in map(Record.from_json, store.records())}
        for record in self._records.values():
            record.status = READING if record.pending else record.status
        self._by_key = {(r.owner, key): r.id for r in self._records.values() for key in r.keys}

    def now(self) -> int:
        """Return the time in whole seconds."""
        return int(self.clock())

    def blank_state(self) -> FamState:
        """Return a state that has read nothing."""
        return self._blank.fork()

    # What there is

    def __len__(self) -> int:
        return len(self._records)

    def everything(self) -> list[Record]:
        """Return all memories of all owners."""
        with self._lock:
            return list(self._records.values())

    def get(self, owner: str, memory: str) -> Record:
        """Return a memory's record.

        Raises:
            ApiError: 404, there is none, or it is another key's, or its time is over.
        """
        with self._lock:
            record = self._records.get(memory)
        if record is not None and record.expires is not None and record.expires <= self.now():
            self.delete(record.owner, memory)
            record = None
        if record is None or record.owner != owner:
            raise ApiError(404, f"there is no memory {memory!r}; list them with GET /v1/memories", "memory_not_found")
        return record

    def all_of(self, owner: str) -> list[Record]:
        """Return a key's memories, the newest first."""
        self.sweep()
        with self._lock:
            own = [record for record in self._records.values() if record.owner == owner]
        return sorted(own, key=lambda record: (-record.created, record.id))

    def sweep(self) -> None:
        """Delete memories whose time is over."""
        now = self.now()
        with self._lock:
            over = [r for r in self._records.values() if r.expires is not None and r.expires <= now]
        for record in over:
            with contextlib.suppress(ApiError):
                self.delete(record.owner, record.id)

    def known(self, owner: str, key: str | None) -> Record | None:
        """Return the memory that a request with this idempotency key has made or changed."""
        with self._lock:
            memory = None if key is None else self._by_key.get((owner, key))
            return None if memory is None else self._records.get(memory)

    # Who works on it

    def claim(self, owner: str, memory: str, resumes: bool = False) -> Record:
        """Return a memory's record, to change it: until `release` nobody else does.

        Args:
            owner: whose it is.
            memory: its id.
            resumes: whether it is claimed to read a text that it has still to read, which comes before all else.

        Raises:
            ApiError: 404; 409, somebody does, or a text is waiting.
        """
        with self._lock:
            record = self.get(owner, memory)
            if memory in self._busy:
                raise ApiError(
                    409,
                    f"memory {memory} is being changed by another request; wait until it is done, or fork the memory",
                    "memory_busy",
                    "memory",
                    1,
                )
            if record.pending and not resumes:
                raise ApiError(
                    409,
                    f"memory {memory} has a text that is not read yet ({record.error or record.status}); wait until "
                    "its status is ready",
                    "memory_not_ready",
                    "memory",
                    5,
                )
            self._busy.add(memory)
        return record

    def release(self, memory: str) -> None:
        """Let others change a memory."""
        with self._lock:
            self._busy.discard(memory)

    @contextlib.contextmanager
    def claimed(self, owner: str, memory: str) -> Iterator[Record]:
        """Claim a memory for the body; see `claim`."""
        record = self.claim(owner, memory)
        try:
            yield record
        finally:
            self.release(memory)

    # States

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

    def state(self, record: Record) -> FamState:
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
        with self._lock:
            if record.id in self._records:
                self._records[record.id].used = max(record.used, self.now())
        found = self.cache.get(record.id, record.state)
        if found is not None:
            return found
        with self.store.local_file(record.owner, record.id, record.state) as path:
            state = self.load(path)
        self.cache.put(record.id, record.state, state.fork())
        return state

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

    # Changes

    def add(self, owner: str, **fields: Any) -> Record:
        """Note a new memory, claimed and not in the store yet, which `commit` or `write` put there."""
        now = self.now()
        record = Record(new_id(), owner, self.model_name, self.fingerprint, created=now, used=now, **fields)
        with self._lock:
            self._records[record.id] = record
            self._busy.add(record.id)
            self._by_key |= {(owner, key): record.id for key in record.keys}
        return record

    def write(self, record: Record, releases: bool = False, **changes: Any) -> Record:
        """Change a memory's record in the store and here; files that it no longer names are removed.

        Args:
            record: of the memory.
            releases: release the memory in the same moment, so that whoever sees the change can make the next.
            **changes: fields of the record.

        Raises:
            ApiError: 404, it was deleted meanwhile; 507 or 503, and all is as it was.
        """
        with self._writing_of(record.id):
            with self._lock:
                before = self._records.get(record.id)
            if before is None:
                raise ApiError(404, f"memory {record.id} was deleted meanwhile", "memory_not_found")
            after = before.changed(**changes | {"used": max(before.used, self.now())})
            after.keys = after.keys[-NUM_KEYS:]
            self.store.put_record(after.owner, after.id, after.to_json())
            with self._lock:
                self._records[after.id] = after
                if releases:
                    self._busy.discard(after.id)
                self._by_key |= {(after.owner, key): after.id for key in after.keys}
            rest = [name for name in before.files if name not in after.files]
            if rest:
                with contextlib.suppress(ApiError):  # else they are removed at the next start
                    self.store.remove(after.owner, after.id, rest)
            return after

    def note(self, record: Record, **changes: Any) -> None:
        """Change a memory's record here alone, where the store does not take it."""
        with self._lock:
            if record.id in self._records:
                self._records[record.id] = self._records[record.id].changed(**changes)

    def commit(self, record: Record, state: FamState, **changes: Any) -> Record:
        """Make a state the memory's, in the store first; errors as `write`."""
        state.compact()
        own = {"bytes": state.file_bytes, "num_tokens_read": state.num_tokens_read}
        with self._writing_of(record.id):
            after = self._put(record, state, "state", **own, **NO_PARTIAL, **changes)
            assert after.state is not None
            self.cache.put(record.id, after.state, state)
            return after

    def save_partial(self, record: Record, state: FamState, num_taken: int) -> Record:
        """Save what was read of a memory's first waiting text, so that a reading that is cut off is resumed there.

        Args:
            record: of the memory, which is claimed.
            state: what it has read, with the part of the text.
            num_taken: tokens of the text that are in it.

        Raises:
            ApiError: as `write`.
        """
        own = {"partial_taken": num_taken, "partial_tokens_read": state.num_tokens_read}
        return self._put(record, state, "partial", **own)

    def partial(self, record: Record) -> FamState:
        """Return what `save_partial` has saved; errors as `load`, and 503."""
        assert record.partial is not None
        with self.store.local_file(record.owner, record.id, record.partial) as path:
            return self.load(path)

    def _put(self, record: Record, state: FamState, field: str, **changes: Any) -> Record:
        """Write a state's file, and then the record that names it in a field."""
        with self._writing_of(record.id):
            name = self.store.put_state(record.owner, record.id, state)
            own = changes | {field: name, "fingerprint": self.fingerprint, "model": self.model_name}
            try:
                return self.write(record, **own)
            except Exception:
                with contextlib.suppress(ApiError):
                    self.store.remove(record.owner, record.id, [name])
                raise

    def fork(self, owner: str, memory: str, name: str | None) -> Record:
        """Return a new memory that has read what another has.

        Raises:
            ApiError: 404; 409, it is being changed; 507 or 503.
        """
        with self.claimed(owner, memory) as record:
            state = self.state(record)
            texts: list[str] = []
            new = self.add(owner, name=name, keep_text=record.keep_text, turns=list(record.turns))
            try:
                for text in record.texts:
                    texts.append(self.store.copy(owner, memory, text, new.id))
                return self.commit(new, state, status=READY, texts=texts, unknown_tokens=record.unknown_tokens)
            except Exception:
                self.forget(new)
                raise
            finally:
                self.release(new.id)

    def delete(self, owner: str, memory: str) -> None:
        """Remove a memory: here, in RAM and in the store; what works on it finds it gone.

        Raises:
            ApiError: 404; 503, the store cannot be reached, and the memory is still there.
        """
        with self._writing_of(memory):
            with self._lock:
                record = self._records.get(memory)
            if record is None or record.owner != owner:
                raise ApiError(404, f"there is no memory {memory!r}", "memory_not_found")
            self.store.remove_memory(owner, memory)
            self.forget(record)

    def forget(self, record: Record) -> None:
        """Remove a memory that is not in the store, with what a failed request may have left there."""
        with self._lock:
            self._records.pop(record.id, None)
            self._by_key = {key: memory for key, memory in self._by_key.items() if memory != record.id}
        self.cache.drop(record.id)
        with contextlib.suppress(ApiError):
            self.store.remove_memory(record.owner, record.id)

    @contextlib.contextmanager
    def _writing_of(self, memory: str) -> Iterator[None]:
        with self._lock:
            lock = self._writing.setdefault(memory, threading.RLock())
        with lock:
            yield
        with self._lock:
            if memory not in self._records:
                self._writing.pop(memory, None)
