"""Records of memories: of one server, which knows them all, or of several, which look them up in their store."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from transformerfam.serving.records import READING, Record
from transformerfam.serving.store import RECORD, Store


class Catalogue(Protocol):
    """Where `Memories` finds records. Errors are the store's: 503 and 507."""

    def __len__(self) -> int:
        """Return the number of memories, when it was looked up last."""

    def get(self, owner: str, memory: str) -> Record | None:
        """Return a memory's record as it is now."""

    def everything(self) -> list[Record]:
        """Return all memories of all owners."""

    def of(self, owner: str) -> list[Record]:
        """Return an owner's memories."""

    def by_key(self, owner: str, key: str) -> Record | None:
        """Return the memory that a request with an idempotency key has made or changed."""

    def add(self, record: Record) -> None:
        """Note a memory that is not in the store yet."""

    def put(self, before: Record, after: Record, then: Callable[[], None]) -> None:
        """Write a record in place of another, in the store first, and call `then` before anybody here sees it."""

    def note(self, record: Record, **changes: Any) -> None:
        """Change a record here alone, where the store did not take it; nothing where others look it up."""

    def forget(self, record: Record) -> None:
        """Forget a memory that is not in the store any more."""

    def leftovers(self) -> list[tuple[str, str]]:
        """Return owner and id of memories in the store with files that their records did not name a moment ago."""


class OwnCatalogue:
    """Records of the one server that has the store: all of them in RAM, read at its start.

    Args:
        store: what no record of it names is removed now.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.RLock()
        self._records = {record.id: record for record in map(Record.from_json, store.records())}
        for record in self._records.values():
            record.status = READING if record.pending else record.status
        self._by_key = {(r.owner, key): r.id for r in self._records.values() for key in r.keys}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, owner: str, memory: str) -> Record | None:
        """Return a memory's record."""
        with self._lock:
            record = self._records.get(memory)
        return record if record is not None and record.owner == owner else None

    def everything(self) -> list[Record]:
        """Return all memories of all owners."""
        with self._lock:
            return list(self._records.values())

    def of(self, owner: str) -> list[Record]:
        """Return an owner's memories."""
        return [record for record in self.everything() if record.owner == owner]

    def by_key(self, owner: str, key: str) -> Record | None:
        """Return the memory of a request with this idempotency key."""
        with self._lock:
            return self._records.get(self._by_key.get((owner, key), ""))

    def add(self, record: Record) -> None:
        """Note a memory that is not in the store yet."""
        with self._lock:
            self._records[record.id] = record
            self._by_key |= {(record.owner, key): record.id for key in record.keys}

    def put(self, before: Record, after: Record, then: Callable[[], None]) -> None:
        """Write a record in place of another; see `Catalogue`."""
        self.store.put_record(after.owner, after.id, after.to_json())
        with self._lock:
            self.add(after)
            then()

    def note(self, record: Record, **changes: Any) -> None:
        """Change a record here alone."""
        with self._lock:
            if record.id in self._records:
                self._records[record.id] = self._records[record.id].changed(**changes)

    def forget(self, record: Record) -> None:
        """Forget a memory."""
        with self._lock:
            self._records.pop(record.id, None)
            self._by_key = {key: memory for key, memory in self._by_key.items() if memory != record.id}

    def leftovers(self) -> list[tuple[str, str]]:
        """Return nothing: they were removed at the start."""
        return []


class SharedCatalogue:
    """Records of a store that several servers use: each is read when it is needed, so that all see the same.

    Args:
        store: it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._new: dict[str, Record] = {}
        self._listed: dict[str, tuple[Any, Record]] = {}  # by the record's file as a listing of the store shows it
        self._leftovers: list[tuple[str, str]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, owner: str, memory: str) -> Record | None:
        """Return a memory's record."""
        with self._lock:
            new = self._new.get(memory)
        if new is not None:
            return new if new.owner == owner else None
        found = self.store.record(owner, memory)
        return Record.from_json(found) if found else None

    def everything(self) -> list[Record]:
        """Return all memories of all owners."""
        records, leftovers, listed = [], [], {}
        for owner, memory, files in self.store.listing():
            record = self._listed_record(owner, memory, files.get(RECORD))
            if record is not None:
                records.append(record)
                listed[memory] = files[RECORD], record
            if set(files) - {RECORD, *(record.files if record else [])}:
                leftovers.append((owner, memory))
        with self._lock:
            self._listed, self._leftovers, self._count = listed, leftovers, len(records)
        return records

    def of(self, owner: str) -> list[Record]:
        """Return an owner's memories."""
        found = (self._listed_record(*one[:2], one[2].get(RECORD)) for one in self.store.listing(owner))
        return [record for record in found if record is not None]

    def _listed_record(self, owner: str, memory: str, tag: Any) -> Record | None:
        """Return the record of a file that a listing shows, read if the file is another than before."""
        if tag is None:
            return None
        with self._lock:
            seen = self._listed.get(memory)
        if seen is not None and seen[0] == tag:
            return seen[1]
        found = self.store.record(owner, memory)
        if not found:
            return None
        record = Record.from_json(found)
        with self._lock:
            self._listed[memory] = tag, record
        return record

    def by_key(self, owner: str, key: str) -> Record | None:
        """Return the memory of a request with this idempotency key; what its record says counts."""
        memory = self.store.memory_of_key(owner, key)
        record = None if memory is None else self.get(owner, memory)
        return record if record is not None and key in record.keys else None

    def add(self, record: Record) -> None:
        """Note a memory that is not in the store yet; no other server sees it before."""
        with self._lock:
            self._new[record.id] = record

    def put(self, before: Record, after: Record, then: Callable[[], None]) -> None:
        """Write a record in place of another, and before it where its idempotency keys lead to; see `Catalogue`."""
        with self._lock:
            known = set() if after.id in self._new else set(before.keys)
        for key in after.keys:
            if key not in known:
                self.store.put_key(after.owner, key, after.id)
        self.store.put_record(after.owner, after.id, after.to_json())
        with self._lock:
            self._new.pop(after.id, None)
        then()
        self.store.remove_keys(after.owner, [key for key in before.keys if key not in after.keys])

    def note(self, record: Record, **changes: Any) -> None:
        """Do nothing: whoever reads the text next writes why it was not read."""

    def forget(self, record: Record) -> None:
        """Forget a memory."""
        with self._lock:
            self._new.pop(record.id, None)
        self.store.remove_keys(record.owner, record.keys)

    def leftovers(self) -> list[tuple[str, str]]:
        """Return what `everything` found."""
        with self._lock:
            return list(self._leftovers)
