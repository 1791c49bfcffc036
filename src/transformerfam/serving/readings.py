"""Texts on their way into memories: read while they arrive, resumed after a restart, read again by other weights."""

import contextlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformerfam.fam.state import FamState
from transformerfam.serving.engine import Engine
from transformerfam.serving.errors import ApiError, as_api_error
from transformerfam.serving.jobs import Reading
from transformerfam.serving.memories import Memories
from transformerfam.serving.records import FAILED, READING, READY, Record
from transformerfam.serving.texts import Spool, TokenFeed

log = logging.getLogger("transformerfam.serving")


class OpenReading:
    """One text that a memory is reading.

    Args:
        record: of the memory, which is claimed for it.
        spool: the text.
        state: what the memory has read; None: nothing.
        text: file of the text in the store; None: it is still arriving.

    Attributes:
        refusal: why the text was refused before it was acknowledged.
        is_settled: set when the text is in the store or refused.
        is_over: set when the memory is ready, failed or gone.
    """

    def __init__(self, record: Record, spool: Spool, state: FamState | None, text: str | None) -> None:
        self.record = record
        self.spool = spool
        self.is_new = state is None and text is None
        self.text = text
        self.num_tokens = 0
        self.refusal: BaseException | None = None
        self.is_settled = threading.Event()
        self.is_over = threading.Event()
        self.feed: TokenFeed
        self.job: Reading
        if text is not None:
            self.is_settled.set()


class Readings:
    """Read texts into memories.

    Args:
        memories: where they go.
        engine: reads.
        tokenizer: of the model, shared.
    """

    def __init__(self, memories: Memories, engine: Engine, tokenizer: Any) -> None:
        self.memories = memories
        self.engine = engine
        self.tokenizer = tokenizer
        self._open: dict[str, OpenReading] = {}
        self._savers = ThreadPoolExecutor(4, thread_name_prefix="saver")

    def close(self) -> None:
        """Wait until what was read is saved, once the engine has ended."""
        self._savers.shutdown(wait=True)

    def num_tokens_of(self, record: Record) -> int:
        """Return the tokens that a memory has read, those of a text that it is reading included."""
        reading = self._open.get(record.id)
        if reading is None or record.status != READING:
            return record.num_tokens_read
        return record.num_tokens_read + reading.num_tokens

    def cancel(self, memory: str) -> None:
        """Drop the text that a memory is reading: the memory was deleted."""
        reading = self._open.get(memory)
        if reading is not None:
            self.engine.cancel(reading.job)

    # From the sender's side

    def begin(
        self, record: Record, spool: Spool, state: FamState | None = None, text: str | None = None
    ) -> OpenReading:
        """Begin to read a text, which may still be arriving, into a claimed memory.

        Args:
            record: of the memory.
            spool: the text.
            state: what the memory has read; None: nothing.
            text: file of the text in the store, where it is there already.

        Raises:
            ApiError: 429 or 503; the memory is released, and a new one forgotten.
        """
        reading = OpenReading(record, spool, state, text)
        begins = state is None or state.num_tokens_read == 0
        reading.feed = TokenFeed(spool, self.tokenizer, begins=begins, allow_unknown=record.allow_unknown)
        reading.job = Reading(
            self.memories.blank_state() if state is None else state,
            reading.feed,
            lambda num_tokens: setattr(reading, "num_tokens", num_tokens),
        )
        reading.job.on_done = lambda error: self._hand_over(reading, error)
        self._open[record.id] = reading
        try:
            self.engine.submit(reading.job, is_promised=text is not None)
        except ApiError as error:
            reading.refusal = error
            self._close(reading)
            raise
        return reading

    def acknowledge(self, reading: OpenReading, key: str | None = None) -> Record:
        """Put a text that has arrived whole into the store, so that no restart loses it, and return the record.

        Args:
            reading: what `begin` returned.
            key: idempotency key of the request.

        Raises:
            ApiError: 507 or 503; the text is not read, and the memory is as it was.
        """
        record = reading.record
        try:
            reading.text = self.memories.store.put_text(record.owner, record.id, reading.spool)
            keys = [*record.keys, *([key] if key is not None else [])]
            pending = [*record.pending, reading.text]
            reading.record = self.memories.write(record, status=READING, pending=pending, keys=keys, error=None)
        except Exception as error:
            self.refuse(reading, error)
            raise
        reading.is_settled.set()
        return reading.record

    def refuse(self, reading: OpenReading, error: BaseException) -> None:
        """Drop a text that is not whole or could not be kept, and wait until the memory is as it was before."""
        reading.refusal = error
        reading.spool.end(error)
        self.engine.cancel(reading.job)
        reading.is_settled.set()
        reading.is_over.wait()

    # After a restart

    def resume(self) -> threading.Thread:
        """Read in a thread what the last server has not read, and again what other weights have read and was kept."""
        thread = threading.Thread(target=self._resume, name="resume", daemon=True)
        thread.start()
        return thread

    def _resume(self) -> None:
        memories = self.memories
        for record in memories.everything():
            is_old = record.fingerprint != memories.fingerprint
            if not record.pending and not (is_old and record.keep_text and record.texts):
                continue
            with contextlib.suppress(ApiError):  # it was deleted, or its owner changes it
                record = memories.claim(record.owner, record.id, resumes=True)
                if is_old and record.keep_text:
                    pending = [*record.texts, *record.pending]
                    changes: dict[str, Any] = {
                        "fingerprint": memories.fingerprint,
                        "state": None,
                        "texts": [],
                        "pending": pending,
                    }
                    record = memories.write(record, status=READING, num_tokens_read=0, **changes)
                self._read_pending(record)

    def _read_pending(self, record: Record) -> None:
        """Read the first text that a claimed memory has still to read; those after it follow."""
        try:
            state = None if record.state is None else self.memories.state(record)
            spool = self.memories.store.text(record.owner, record.id, record.pending[0])
            self.begin(record, spool, state, record.pending[0]).is_over.wait()
        except Exception as error:
            self._fail(record, error)
            self.memories.release(record.id)

    # From the engine's side

    def _hand_over(self, reading: OpenReading, error: BaseException | None) -> None:
        self._savers.submit(self._end, reading, error)

    def _end(self, reading: OpenReading, error: BaseException | None) -> None:
        """Save what was read, once its sender knows that the text has arrived."""
        reading.is_settled.wait()
        record, rest, is_released = reading.record, None, False
        try:
            if reading.refusal is not None or reading.text is None:
                return
            if error is None:
                rest = self._commit(reading)
                is_released = rest is None
            elif not (isinstance(error, ApiError) and error.code in ("server_ending", "cancelled")):
                self._fail(record, error)  # else it is resumed by the next server, or was deleted
        except Exception as failure:
            self._fail(record, failure)
        finally:
            self._close(reading, releases=rest is None and not is_released)
        if rest is not None:
            self._savers.submit(self._read_pending, rest)

    def _commit(self, reading: OpenReading) -> Record | None:
        """Save a memory that has read a text; return its record where another text is to follow."""
        record, text = reading.record, reading.text
        pending = [name for name in record.pending if name != text]
        texts = [*record.texts, *([text] if record.keep_text and text else [])]
        unknown = record.unknown_tokens + reading.feed.num_unknown
        status = READING if pending else READY
        changes = {"status": status, "pending": pending, "texts": texts, "error": None, "unknown_tokens": unknown}
        after = self.memories.commit(record, reading.job.state, releases=not pending, **changes)
        log.info("memory read", extra={"memory": after.id, "tokens": after.num_tokens_read})
        return after if pending else None

    def _fail(self, record: Record, error: BaseException) -> None:
        """Note why a text was not read; a state of before stays as it was."""
        refusal = as_api_error(error)
        if refusal.code == "memory_not_found":
            return
        if refusal.code == "internal_error":
            log.error("a text was not read", exc_info=error)
        is_store = refusal.status in (503, 507)  # whose next start tries again
        pending = record.pending if is_store else []
        try:
            self.memories.write(record, status=FAILED, error=str(refusal), pending=pending)
        except ApiError:
            self.memories.note(record, status=FAILED, error=str(refusal))

    def _close(self, reading: OpenReading, releases: bool = True) -> None:
        """Let others have the memory; forget a new one whose text was refused."""
        record = reading.record
        self._open.pop(record.id, None)
        reading.feed.close()
        if reading.refusal is not None and reading.is_new:
            self.memories.forget(record)
        if releases:
            self.memories.release(record.id)
        reading.is_over.set()
