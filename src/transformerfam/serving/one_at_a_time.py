"""Whatever must not happen twice at once: a change of a memory, a write of its record, a request with one key."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator

from transformerfam.serving.claims import Claims
from transformerfam.serving.errors import ApiError
from transformerfam.serving.records import Record

WRITE_SECONDS = 10.0
"""How long a write waits for that of another server."""
CLAIM_SECONDS = 0.5
"""How long a request waits for a memory that another server is about to leave."""
POLL_SECONDS = 0.01
NUM_LOCKS = 1024
"""Locks of threads; memories whose ids fall together share one."""


class OneAtATime:
    """Keep threads and servers from one another.

    Args:
        claims: by which servers do.
    """

    def __init__(self, claims: Claims) -> None:
        self.claims = claims
        self._writing = [threading.RLock() for _ in range(NUM_LOCKS)]

    def take(self, name: str, seconds: float = 0.0) -> bool:
        """Take a claim, which may be free within some seconds; return whether it was.

        Raises:
            ApiError: 503, nobody can say.
        """
        end = time.monotonic() + seconds
        with _asked():
            while not self.claims.take(name):
                if time.monotonic() >= end:
                    return False
                time.sleep(POLL_SECONDS)
        return True

    @contextlib.contextmanager
    def writing(self, memory: str) -> Iterator[None]:
        """Let no other thread of this server write a memory during the body."""
        with self._writing[hash(memory) % NUM_LOCKS]:
            yield

    @contextlib.contextmanager
    def alone(self, memory: str) -> Iterator[None]:
        """Let no other server write a memory's record during the body.

        Raises:
            ApiError: 503, one does, for longer than it may take.
        """
        name = f"{memory}.write"
        if not self.take(name, WRITE_SECONDS):
            raise ApiError(503, f"memory {memory} is being written by another server; try again", "write_busy", None, 5)
        try:
            yield
        finally:
            self.claims.free(name)

    @contextlib.contextmanager
    def with_key(self, owner: str, key: str | None) -> Iterator[None]:
        """Let nobody else serve a request with an idempotency key during the body.

        Raises:
            ApiError: 409, somebody does.
        """
        if key is None:
            yield
            return
        name = f"key-{owner}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        if not self.take(name):
            raise ApiError(
                409, "a request with this Idempotency-Key is being served; send it again later", "key_busy", None, 1
            )
        try:
            yield
        finally:
            self.claims.free(name)

    def require(self, record: Record, before: Record) -> None:
        """Refuse a change by a server that was taken for gone, so that another one may have changed the memory.

        Args:
            record: of the memory, as this server knows it.
            before: as it is in the store.

        Raises:
            ApiError: 409, it was; 503, nobody can say.
        """
        with _asked():
            is_own = self.claims.confirm(record.id)
        if not is_own or (record.state, record.pending) != (before.state, before.pending):
            raise ApiError(
                409,
                f"this server was not heard of for too long, and memory {record.id} may be changed by another one; "
                "nothing was changed here, send the request again",
                "claim_lost",
                "memory",
                1,
            )


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """Turn the errors of claims into an answer."""
    try:
        yield
    except Exception as error:
        raise ApiError(
            503,
            f"the server cannot find out who changes a memory ({type(error).__name__}); try again",
            "claims_unreachable",
            None,
            5,
        ) from error
