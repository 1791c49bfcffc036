"""Memories by their owners: what there is, who works on it, and how a new state takes the old one's place."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformerfam.fam.state import FamState
from transformerfam.serving.catalogue import Catalogue, OwnCatalogue, SharedCatalogue
from transformerfam.serving.claims import Claims, OwnClaims
from transformerfam.serving.errors import ApiError
from transformerfam.serving.one_at_a_time import CLAIM_SECONDS, OneAtATime
from transformerfam.serving.records import NO_PARTIAL, NUM_KEYS, READY, Record, new_id
from transformerfam.serving.states import States
from transformerfam.serving.store import Store

WORK = frozenset(("state", "partial", "pending", "texts"))
"""Fields of a record that whoever has claimed its memory changes alone."""


class Memories:
    """All memories of a server, or of a store that several servers share.

    Args:
        store: where they are kept.
        model: that reads them.
        model_name: what it is called.
        budget_bytes: bytes of states in RAM at most.
        clock: gives the time in seconds since 1970.
        claims: by which servers that share the store keep one another from the same memory; None: it is not shared.

    Raises:
        ApiError: the store cannot be reached.
    """

    def __init__(
        self,
        store: Store,
        model: Any,
        model_name: str,
        budget_bytes: int,
        clock: Callable[[], float] = time.time,
        claims: Claims | None = None,
    ) -> None:
        self.store = store
        self.model_name = model_name
        self.states = States(store, model, budget_bytes)
        self.cache = self.states.cache
        self.clock = clock
        self.fingerprint = self.states.fingerprint
        self.claims: Claims = OwnClaims() if claims is None else claims
        self.one = OneAtATime(self.claims)
        self._patience = 0.0 if claims is None else CLAIM_SECONDS
        self.catalogue: Catalogue = OwnCatalogue(store) if claims is None else SharedCatalogue(store)

    def now(self) -> int:
        """Return the time in whole seconds."""
        return int(self.clock())

    # What there is

    def __len__(self) -> int:
        return len(self.catalogue)

    def everything(self) -> list[Record]:
        """Return all memories of all owners."""
        return self.catalogue.everything()

    def get(self, owner: str, memory: str) -> Record:
        """Return a memory's record.

        Raises:
            ApiError: 404, there is none, or it is another key's, or its time is over.
        """
        record = self.catalogue.get(owner, memory)
        if record is not None and self._is_over(record):
            self.delete(owner, memory)
            record = None
        if record is None:
            raise ApiError(404, f"there is no memory {memory!r}; list them with GET /v1/memories", "memory_not_found")
        return record

    def all_of(self, owner: str) -> list[Record]:
        """Return a key's memories, the newest first."""
        own = self._without_over(self.catalogue.of(owner))
        return sorted(own, key=lambda record: (-record.created, record.id))

    def sweep(self) -> None:
        """Delete memories whose time is over, and forget what other servers have deleted or left.

        Raises:
            ApiError: the store cannot be reached.
        """
        self.cache.keep(record.id for record in self._without_over(self.everything()))
        for owner, memory in self.catalogue.leftovers():
            if self.one.take(memory):
                try:
                    with self.one.alone(memory):
                        self.store.clean(owner, memory)
                finally:
                    self.release(memory)

    def _is_over(self, record: Record) -> bool:
        return record.expires is not None and record.expires <= self.now()

    def _without_over(self, records: list[Record]) -> list[Record]:
        """Return the records of memories whose time is not over, and delete the others."""
        for record in records:
            if self._is_over(record):
                with contextlib.suppress(ApiError):
                    self.delete(record.owner, record.id)
        return [record for record in records if not self._is_over(record)]

    def known(self, owner: str, key: str | None) -> Record | None:
        """Return the memory that a request with this idempotency key has made or changed."""
        return None if key is None else self.catalogue.by_key(owner, key)

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
        self.get(owner, memory)
        if not self.one.take(memory, 0.0 if resumes else self._patience):
            raise ApiError(
                409,
                f"memory {memory} is being changed by another request; wait until it is done, or fork the memory",
                "memory_busy",
                "memory",
                1,
            )
        try:
            record = self.get(owner, memory)  # as it is, now that nobody changes it
            if record.pending and not resumes:
                raise ApiError(
                    409,
                    f"memory {memory} has a text that is not read yet ({record.error or record.status}); wait until "
                    "its status is ready",
                    "memory_not_ready",
                    "memory",
                    5,
                )
            return record
        except BaseException:
            self.release(memory)
            raise

    def release(self, memory: str) -> None:
        """Let others change a memory."""
        self.claims.free(memory)

    @contextlib.contextmanager
    def claimed(self, owner: str, memory: str) -> Iterator[Record]:
        """Claim a memory for the body; see `claim`."""
        record = self.claim(owner, memory)
        try:
            yield record
        finally:
            self.release(memory)

    # States

    def blank_state(self) -> FamState:
        """Return a state that has read nothing."""
        return self.states.blank()

    def state(self, record: Record) -> FamState:
        """Return a copy of a memory's state.

        Raises:
            ApiError: 409, it is not read yet or of other weights; 503, the store cannot be reached.
        """
        state = self.states.of(record)
        self.catalogue.note(record, used=max(record.used, self.now()))
        return state

    def partial(self, record: Record) -> FamState:
        """Return what `save_partial` has saved.

        Raises:
            ApiError: 409, other weights have read it; 400, it is no state of this model; 503.
        """
        assert record.partial is not None
        return self.states.from_store(record, record.partial)

    def load(self, path: Path) -> FamState:
        """Load the file of a state; see `States.load`."""
        return self.states.load(path)

    # Changes

    def add(self, owner: str, **fields: Any) -> Record:
        """Note a new memory, claimed and not in the store yet, which `commit` or `write` put there."""
        now = self.now()
        record = Record(new_id(), owner, self.model_name, self.fingerprint, created=now, used=now, **fields)
        if not self.one.take(record.id):
            raise AssertionError("nobody else knows the id")
        self.catalogue.add(record)
        return record

    def write(self, record: Record, releases: bool = False, **changes: Any) -> Record:
        """Change a memory's record in the store and here; files that it no longer names are removed.

        Args:
            record: of the memory.
            releases: release the memory in the same moment, so that whoever sees the change can make the next.
            **changes: fields of the record.

        Raises:
            ApiError: 404, it was deleted meanwhile; 409, the claim on it was lost; 507 or 503. All is as it was.
        """
        with self.one.writing(record.id):
            with self.one.alone(record.id):
                before = self.catalogue.get(record.owner, record.id)
                if before is None:
                    raise ApiError(404, f"memory {record.id} was deleted meanwhile", "memory_not_found")
                if WORK.intersection(changes):
                    self.one.require(record, before)
                after = before.changed(**changes | {"used": max(before.used, self.now())})
                after.keys = after.keys[-NUM_KEYS:]
                self.catalogue.put(before, after, (lambda: self.release(after.id)) if releases else _nothing)
            rest = [name for name in before.files if name not in after.files]
            if rest:
                with contextlib.suppress(ApiError):  # else they are removed at the next start
                    self.store.remove(after.owner, after.id, rest)
            return after

    def note(self, record: Record, **changes: Any) -> None:
        """Change a memory's record here alone, where the store does not take it."""
        self.catalogue.note(record, **changes)

    def commit(self, record: Record, state: FamState, **changes: Any) -> Record:
        """Make a state the memory's, in the store first; errors as `write`."""
        state.compact()
        own = {"bytes": state.file_bytes, "num_tokens_read": state.num_tokens_read}
        with self.one.writing(record.id):
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

    def _put(self, record: Record, state: FamState, field: str, **changes: Any) -> Record:
        """Write a state's file, and then the record that names it in a field."""
        with self.one.writing(record.id):
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
        with self.one.writing(memory), self.one.alone(memory):
            record = self.catalogue.get(owner, memory)
            if record is None:
                raise ApiError(404, f"there is no memory {memory!r}", "memory_not_found")
            self.store.remove_memory(owner, memory)
            self.forget(record)

    def forget(self, record: Record) -> None:
        """Remove a memory that is not in the store, with what a failed request may have left there."""
        self.catalogue.forget(record)
        self.cache.drop(record.id)
        with contextlib.suppress(ApiError):
            self.store.remove_memory(record.owner, record.id)


def _nothing() -> None:
    """Do nothing."""
