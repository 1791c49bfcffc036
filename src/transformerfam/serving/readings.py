"""Texts on their way into memories: read while they arrive, resumed after a restart, read again by other weights."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformerfam.fam.state import FamState
from transformerfam.serving.engine import Engine
from transformerfam.serving.errors import ApiError, as_api_error
from transformerfam.serving.jobs import Reading
from transformerfam.serving.memories import Memories
from transformerfam.serving.records import FAILED, NO_PARTIAL, READING, READY, Record
from transformerfam.serving.texts import Spool, TokenFeed

SAVE_SECONDS = 60.0
"""How often what was read of a text is saved: a server that is killed loses so much reading at most."""
GONE = ("memory_not_found", "claim_lost")
"""Why a text is not read further: its memory was deleted, or another server reads it."""

log = logging.getLogger("transformerfam.serving")


class OpenReading:
    """One text that a memory is reading.

    Args:
        record: of the memory, which is claimed for it.
        spool: the text.
        state: what the memory has read; None: nothing.
        text: file of the text in the store; None: it is still arriving.
        now: seconds of the clock by which it is saved.

    Attributes:
        num_tokens: tokens of it that are read; `num_before` of them by servers of before.
        saved: when it was saved last, by the same clock.
        saving: held while it is saved or ended.
        is_saving: whether it is being saved.
        is_ended: whether it is not saved any more.
        refusal: why the text was refused before it was acknowledged.
        is_settled: set when the text is in the store or refused.
        is_over: set when the memory is ready, failed or gone.
    """

    def __init__(
        self, record: Record, spool: Spool, state: FamState | None, text: str | None, now: float = 0.0
    ) -> None:
        self.record = record
        self.spool = spool
        self.is_new = state is None and text is None
        self.text = text
        self.num_before = max(0, record.partial_tokens_read - record.num_tokens_read)
        self.num_tokens = self.num_before
        self.saved = now
        self.saving = threading.Lock()
        self.is_saving = False
        self.is_ended = False
        self.refusal: BaseException | None = None
        self.is_settled = threading.Event()
        self.is_over = threading.Event()
        self.feed: TokenFeed
        self.job: Reading
        if text is not None:
            self.is_settled.set()

    @property
    def is_acknowledged(self) -> bool:
        """Whether the text is in the store, and is read whatever ends this server."""
        return self.text is not None and self.is_settled.is_set() and self.refusal is None


class Readings:
    """Read texts into memories.

    Args:
        memories: where they go.
        engine: reads.
        tokenizer: of the model, shared.
        save_seconds: how often what was read of a text is saved.
        clock: gives the time in seconds.
    """

    def __init__(
        self,
        memories: Memories,
        engine: Engine,
        tokenizer: Any,
        save_seconds: float = SAVE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memories = memories
        self.engine = engine
        self.tokenizer = tokenizer
        self.save_seconds = save_seconds
        self.clock = clock
        self._open: dict[str, OpenReading] = {}
        self._savers = ThreadPoolExecutor(4, thread_name_prefix="saver")

    def close(self) -> None:
        """Wait until what was read is saved, once the engine has ended."""
        self._savers.shutdown(wait=True)

    def num_tokens_of(self, record: Record) -> int:
        """Return the tokens that a memory has read, those of a text that it is reading included."""
        reading = self._open.get(record.id)
        if record.status != READING:
            return record.num_tokens_read
        if reading is None:
            return max(record.num_tokens_read, record.partial_tokens_read)
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
            state: what the memory has read, the record's `partial_taken` tokens of the text included; None: nothing.
            text: file of the text in the store, where it is there already.

        Raises:
            ApiError: 429 or 503; the memory is released, and a new one forgotten.
        """
        reading = OpenReading(record, spool, state, text, self.clock())
        reading.feed = TokenFeed(
            spool,
            self.tokenizer,
            begins=record.num_tokens_read == 0,
            allow_unknown=record.allow_unknown,
            num_taken=record.partial_taken,
        )
        reading.job = Reading(
            self.memories.blank_state() if state is None else state,
            reading.feed,
            lambda num_tokens: self._note(reading, num_tokens),
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

    def resume(self, rereads: bool = True) -> threading.Thread:
        """Read in a thread what servers that ended have not read.

        Args:
            rereads: whether what other weights have read, and was kept, is read again, too.
        """
        thread = threading.Thread(target=self._resume, args=(rereads,), name="resume", daemon=True)
        thread.start()
        return thread

    def _resume(self, rereads: bool) -> None:
        try:
            records = self.memories.everything()
        except ApiError as error:
            log.warning("what is to be read is not known: %s", error)
            return
        for record in records:
            if record.pending or (rereads and self._has_to_read(record)):
                with contextlib.suppress(ApiError):  # it was deleted, or its owner or another server changes it
                    self._resume_one(self.memories.claim(record.owner, record.id, resumes=True))

    def _has_to_read(self, record: Record) -> bool:
        is_old = record.fingerprint != self.memories.fingerprint
        return bool(record.pending or (is_old and record.keep_text and record.texts))

    def _resume_one(self, record: Record) -> None:
        """Read what a claimed memory has still to read, if it has, and release it."""
        memories = self.memories
        is_old = record.fingerprint != memories.fingerprint
        if not self._has_to_read(record):
            memories.release(record.id)
            return
        if is_old and record.keep_text:
            pending = [*record.texts, *record.pending]
            own: dict[str, Any] = {"fingerprint": memories.fingerprint, "state": None, "texts": [], "pending": pending}
            try:
                record = memories.write(record, status=READING, num_tokens_read=0, **own, **NO_PARTIAL)
            except BaseException:
                memories.release(record.id)
                raise
        self._read_pending(record)

    def _read_pending(self, record: Record) -> None:
        """Read the first text that a claimed memory has still to read; those after it follow."""
        try:
            record, state = self._state_to_resume(record)
            spool = self.memories.store.text(record.owner, record.id, record.pending[0])
            self.begin(record, spool, state, record.pending[0]).is_over.wait()
        except Exception as error:
            self._fail(record, error)
            self.memories.release(record.id)

    def _state_to_resume(self, record: Record) -> tuple[Record, FamState | None]:
        """Return what a memory has read of its first waiting text, or of all before it; None: nothing."""
        if record.partial is not None:
            try:
                return record, self.memories.partial(record)
            except ApiError as error:
                if error.status == 503:
                    raise
                log.warning("a text is read from its beginning: %s", error, extra={"memory": record.id})
                record = self.memories.write(record, **NO_PARTIAL)
        return record, None if record.state is None else self.memories.state(record)

    # From the engine's side

    def _note(self, reading: OpenReading, num_tokens: int) -> None:
        """Note how much of a text is read, and let it be saved when it is time."""
        reading.num_tokens = reading.num_before + num_tokens
        now = self.clock()
        if reading.is_saving or not reading.is_acknowledged or now - reading.saved < self.save_seconds:
            return
        reading.saved, reading.is_saving = now, True
        self._savers.submit(self._save, reading, reading.job.state.fork(), reading.feed.num_taken)

    def _save(self, reading: OpenReading, state: FamState, num_taken: int) -> None:
        """Save what was read of a text, unless it is over; it is not read further if that is not ours to do."""
        with reading.saving:
            try:
                if not reading.is_ended and num_taken > reading.record.partial_taken:
                    reading.record = self.memories.save_partial(reading.record, state, num_taken)
            except ApiError as error:
                if error.code in GONE:
                    self.engine.cancel(reading.job)
                else:
                    log.warning("what was read is not saved: %s", error, extra={"memory": reading.record.id})
            except Exception:  # the text is in the store, and is read whatever became of its part
                log.exception("what was read is not saved", extra={"memory": reading.record.id})
            finally:
                reading.is_saving = False

    def _hand_over(self, reading: OpenReading, error: BaseException | None) -> None:
        self._savers.submit(self._end, reading, error)

    def _end(self, reading: OpenReading, error: BaseException | None) -> None:
        """Save what was read, once its sender knows that the text has arrived."""
        reading.is_settled.wait()
        if isinstance(error, ApiError) and error.code == "server_ending" and reading.is_acknowledged:
            self._save(reading, reading.job.state, reading.feed.num_taken)  # where the next server resumes it
        with reading.saving:
            reading.is_ended = True
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
        if refusal.code in GONE:
            return
        if refusal.code == "internal_error":
            log.error("a text was not read", exc_info=error)
        is_store = refusal.status in (503, 507)  # whose next start tries again
        rest: dict[str, Any] = {} if is_store else {"pending": [], **NO_PARTIAL}
        try:
            self.memories.write(record, status=FAILED, error=str(refusal), **rest)
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
