"""What is said of a memory, besides its state."""

import dataclasses
import hashlib
import json
import secrets
from typing import Any, Self

from transformerfam.decoder.memory import memory_of

READING, READY, FAILED = "reading", "ready", "failed"
NO_PARTIAL: dict[str, Any] = {"partial": None, "partial_taken": 0, "partial_tokens_read": 0}
"""Fields of a record of which no text is read in part."""
NUM_KEYS = 64
"""Idempotency keys that a memory remembers."""


@dataclasses.dataclass
class Record:
    """One memory.

    Attributes:
        id: its name in the API.
        owner: digest of the key that it belongs to.
        name: what its owner calls it.
        status: `READING`, `READY` or `FAILED`; a failed append leaves the state of before, and `error` says why.
        num_tokens_read: tokens that it has read.
        bytes: of its state in the store.
        model: name of the model.
        fingerprint: of the model's weights and the memory's configuration; see `fingerprint_of`.
        created: seconds since 1970.
        used: likewise.
        expires: likewise, or None.
        keep_text: whether its texts stay in the store, so that it can be read again by other weights.
        allow_unknown: whether texts of unknown words are read.
        state: file of its state; None before there is one.
        pending: files of texts that are to be read.
        partial: file of what was read of the first of them, saved from time to time; None: nothing, or no reading.
        partial_taken: tokens of that text that are in it.
        partial_tokens_read: tokens that it has read, those of before the text included.
        texts: files of texts that were read and are kept.
        turns: digests of the messages of a chat that it has read.
        error: why the last reading failed.
        keys: idempotency keys of requests that it has taken.
        unknown_tokens: tokens that were words the tokenizer does not know.
    """

    id: str
    owner: str
    model: str
    fingerprint: str
    created: int
    used: int
    name: str | None = None
    status: str = READING
    num_tokens_read: int = 0
    bytes: int = 0
    expires: int | None = None
    keep_text: bool = False
    allow_unknown: bool = False
    state: str | None = None
    pending: list[str] = dataclasses.field(default_factory=list)
    partial: str | None = None
    partial_taken: int = 0
    partial_tokens_read: int = 0
    texts: list[str] = dataclasses.field(default_factory=list)
    turns: list[str] = dataclasses.field(default_factory=list)
    error: str | None = None
    keys: list[str] = dataclasses.field(default_factory=list)
    unknown_tokens: int = 0

    @property
    def files(self) -> list[str]:
        """Files in the store that belong to it."""
        return [*(name for name in (self.state, self.partial) if name), *self.pending, *self.texts]

    def to_json(self) -> dict[str, Any]:
        """Return what the store keeps."""
        return dataclasses.asdict(self) | {"files": self.files}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return what `to_json` gave; fields of versions to come are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def public(self) -> dict[str, Any]:
        """Return what its owner sees."""
        shown = ("name", "status", "num_tokens_read", "bytes", "model", "fingerprint", "created", "used", "expires")
        more = ("keep_text", "unknown_tokens", "error")
        return {"id": self.id, "object": "memory"} | {name: getattr(self, name) for name in (*shown, *more)}

    def changed(self, **changes: Any) -> Self:
        """Return another record with other fields."""
        return dataclasses.replace(self, **changes)


def new_id() -> str:
    """Return the name of a new memory."""
    return f"mem_{secrets.token_hex(12)}"


def owner_of(key: str) -> str:
    """Return what a key is called in the store, which never holds the key itself."""
    return hashlib.sha256(f"transformerfam key {key}".encode()).hexdigest()[:16]


def fingerprint_of(model: Any) -> str:
    """Return what changes with a model's weights, its adapter, and the configuration of its memory."""
    memory = memory_of(model)
    assert memory.identity is not None
    metadata = memory.identity.to_metadata(memory.config)
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
