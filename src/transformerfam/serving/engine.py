"""The one thread that runs the model: all answers in one batch, texts in slices in between.

Each turn is one step of the batch, in which every answer gets a token, and one slice of a prompt or a text. So a text
of any length delays an answer's next token by one slice, about `slice_seconds`. Answers join and leave at any step:
`FamState.stack` puts their states side by side, `select` takes them apart.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from transformerfam.fam.state import FamState
from transformerfam.serving.errors import ApiError
from transformerfam.serving.jobs import Generation, Job, Reading

SMALLEST_SLICE = 16
"""Tokens of a slice at least."""
ALONE_FACTOR = 2
"""How many times longer a slice is while no answer is open: longer ones are read faster."""
READINGS_TURN = 4
"""Texts are read in one turn of so many while there are prompts, which somebody waits for."""
RATE_SHARE = 0.5
"""Share of the last slice in the rate by which the next one is sized."""
POLL_SECONDS = 0.02
"""How often texts that are still arriving are looked at when there is nothing else to do."""

log = logging.getLogger("transformerfam.serving")


class Engine:
    """Run a model for many states.

    Args:
        model: converted, in evaluation mode; nobody else runs it meanwhile.
        max_batch: answers that are generated side by side.
        max_waiting: further answers that wait for a place.
        max_readings: texts that are read in turn.
        slice_seconds: how long a slice of a text or a prompt is to take.
        clock: gives the time in seconds.

    Attributes:
        num_generated: tokens of answers so far.
        num_read: tokens of prompts and texts so far.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = 8,
        max_waiting: int = 32,
        max_readings: int = 8,
        slice_seconds: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.max_readings = max_readings
        self.slice_seconds = slice_seconds
        self.clock = clock
        self.num_generated = 0
        self.num_read = 0
        self._condition = threading.Condition()
        self._arrived: list[Job] = []
        self._waiting: collections.deque[Generation] = collections.deque()
        self._prompts: collections.deque[Generation] = collections.deque()
        self._readings: collections.deque[Reading] = collections.deque()
        self._rows: list[Generation] = []
        self._batch: FamState | None = None
        self._rate = SMALLEST_SLICE / slice_seconds
        self._turn = 0
        self._is_idle = True  # whether the last turn found nothing to do
        self._num_open = {Generation: 0, Reading: 0}
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread takes its turns."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread after its turn; jobs that are not done fail as those of a server that ends."""
        with self._condition:
            self._is_stopped = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job, is_promised: bool = False) -> None:
        """Take a job.

        Args:
            job: what to do.
            is_promised: whether it was acknowledged before, and is taken even where the queue is full.

        Raises:
            ApiError: 429, the queue is full; 503, the server ends.
        """
        kind = Reading if isinstance(job, Reading) else Generation
        limit = self.max_readings if kind is Reading else self.max_batch + self.max_waiting
        with self._condition:
            if self._is_stopped:
                raise ApiError(503, "the server is ending; send the request again later", "server_ending", None, 5)
            if self._num_open[kind] >= limit and not is_promised:
                what = "texts being read" if kind is Reading else "answers being generated"
                raise ApiError(
                    429, f"there are {limit} {what}, which is the limit; try again later", "queue_full", None, 2
                )
            self._num_open[kind] += 1
            self._arrived.append(job)
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job at the next step; one that is done stays so."""
        job.is_cancelled = True
        with self._condition:
            self._condition.notify()

    def counts(self) -> dict[str, int]:
        """Return the numbers of open jobs."""
        return {
            "generating": len(self._rows),
            "open_answers": self._num_open[Generation],
            "open_readings": self._num_open[Reading],
        }

    # The thread

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self.turn()
                except Exception as error:  # of no job alone; those that are open fail with it, others are served
                    log.exception("the engine failed at a turn")
                    self._fail_all(error)
        self._fail_all(ApiError(503, "the server ended before the answer was complete", "server_ending", None, 5))

    def _wait(self) -> bool:
        """Wait for work; return False where the thread is to end."""
        with self._condition:
            while not self._is_stopped and not self._arrived and not self._has_work():
                if self._readings and not self._is_idle:
                    break
                self._condition.wait(POLL_SECONDS if self._readings else None)
                self._is_idle = False
            return not self._is_stopped

    def _has_work(self) -> bool:
        return bool(self._rows or self._prompts or self._waiting)

    @torch.no_grad()
    def turn(self) -> None:
        """Do one step of the batch and one slice."""
        with self._condition:
            arrived, self._arrived = self._arrived, []
        for job in arrived:
            (self._readings if isinstance(job, Reading) else self._waiting).append(job)  # type: ignore[arg-type]
        self._drop_cancelled()
        while self._waiting and len(self._rows) + len(self._prompts) < self.max_batch:
            self._prompts.append(self._waiting.popleft())
        if self._rows:
            self._step()
        self._turn += 1
        self._is_idle = False
        if self._prompts and not (self._turn % READINGS_TURN == 0 and self._read_slice()):
            self._prompt_slice()
        elif not self._prompts:
            self._is_idle = not self._read_slice()

    def _drop_cancelled(self) -> None:
        for queue in (self._waiting, self._prompts, self._readings):
            for job in [job for job in queue if job.is_cancelled]:
                queue.remove(job)  # type: ignore[arg-type]
                self._finish(job, ApiError(499, "the client is gone", "cancelled"))
        for job in self._leave(lambda job: job.is_cancelled):
            self._finish(job, ApiError(499, "the client is gone", "cancelled"))

    # The batch

    def _step(self) -> None:
        """Give every answer of the batch its next token."""
        assert self._batch is not None
        try:
            logits_BV = self._logits([job.last_token or 0 for job in self._rows], self._batch)
        except Exception as error:
            self._step_alone(error)
            return
        done: list[Generation] = []
        for job, logits_V in zip(self._rows, logits_BV, strict=True):
            self._accept(job, logits_V, done)
        for job in self._leave(lambda job: job in done):
            self._finish(job, None)

    def _logits(self, tokens: list[int], state: FamState) -> torch.Tensor:
        ids_B1 = torch.tensor(tokens, device=self.model.device)[:, None]
        logits: torch.Tensor = self.model(input_ids=ids_B1, past_key_values=state, logits_to_keep=1).logits[:, -1]
        return logits

    def _accept(self, job: Generation, logits_V: torch.Tensor, done: list[Generation]) -> None:
        """Draw a job's next token, and note the job if it is done; one that fails is taken out."""
        try:
            self.num_generated += 1
            if job.accept(logits_V):
                done.append(job)
        except Exception as error:
            self._leave(lambda other: other is job)
            self._finish(job, error)

    def _step_alone(self, error: Exception) -> None:
        """Take a step for each answer alone, since the batch fails at one of them, which fails with its error."""
        rows, batch = list(self._rows), self._batch
        assert batch is not None
        self._rows, self._batch = [], None
        for row, job in enumerate(rows):
            state = batch.select([row])
            try:
                logits_V = error if len(rows) == 1 else self._logits([job.last_token or 0], state)[0]
            except Exception as own:
                logits_V = own
            if isinstance(logits_V, Exception):
                self._finish(job, logits_V)
                continue
            job.state = state
            self._join(job)
            done: list[Generation] = []
            self._accept(job, logits_V, done)
            for one in self._leave(lambda other, done=done: other in done):  # type: ignore[misc]
                self._finish(one, None)

    def _join(self, job: Generation) -> None:
        """Put an answer into the batch."""
        self._batch = job.state if self._batch is None else FamState.stack([self._batch, job.state])
        self._rows.append(job)

    def _leave(self, chosen: Callable[[Generation], bool]) -> list[Generation]:
        """Take answers out of the batch, each with its state."""
        leaving = [row for row, job in enumerate(self._rows) if chosen(job)]
        staying = [row for row in range(len(self._rows)) if row not in leaving]
        batch, jobs = self._batch, [self._rows[row] for row in leaving]
        if batch is None or not leaving:
            return []
        for row, job in zip(leaving, jobs, strict=True):
            job.state = batch.select([row]) if len(self._rows) > 1 else batch
        self._batch = batch.select(staying) if staying else None
        self._rows = [self._rows[row] for row in staying]
        return jobs

    # Slices

    def _slice_length(self, state: FamState) -> int:
        """Return the tokens of the next slice: what `slice_seconds` allow, and not beyond the block."""
        room = state.config.block_size - state.block_fill[0]
        seconds = self.slice_seconds * (1 if self._has_work() else ALONE_FACTOR)
        return min(room, max(SMALLEST_SLICE, int(self._rate * seconds)))

    def _timed(self, num_tokens: int, began: float) -> None:
        """Note how fast a slice was read."""
        self.num_read += num_tokens
        seconds = self.clock() - began
        if seconds > 0 and num_tokens >= SMALLEST_SLICE // 2:
            self._rate += RATE_SHARE * (num_tokens / seconds - self._rate)

    def _prompt_slice(self) -> None:
        """Read a slice of the first prompt; after its last one the answer joins the batch with its first token."""
        job = self._prompts.popleft()
        try:
            state, began = job.state, self.clock()
            if state.unread_ids[0] is not None:
                job.prompt[:0] = [state.unread_ids[0]]
                state.unread_ids = [None]
            ids = job.prompt[job.num_read : job.num_read + self._slice_length(state)]
            job.num_read += len(ids)
            is_last = job.num_read >= len(job.prompt)
            ids_1T = torch.tensor([ids], device=self.model.device)
            if not is_last:
                self.model.read(ids_1T, state)
                self._timed(len(ids), began)
                self._prompts.append(job)
                return
            logits_V = self.model(input_ids=ids_1T, past_key_values=state, logits_to_keep=1).logits[0, -1]
            self._timed(len(ids), began)
            job.start = state.fork() if job.keeps_start else None
            self.num_generated += 1
            if job.accept(logits_V):
                self._finish(job, None)
            else:
                self._join(job)
        except Exception as error:
            self._finish(job, error)

    def _read_slice(self) -> bool:
        """Read a slice of the next text that has one; return whether there was any."""
        for _ in range(len(self._readings)):
            job = self._readings.popleft()
            try:
                state, began = job.state, self.clock()
                ids = job.source.take(self._slice_length(state))
                if ids is None:
                    self._finish(job, None)
                    continue
                if ids:
                    if state.unread_ids[0] is not None:
                        ids = [state.unread_ids[0], *ids]
                    job.read(self.model, torch.tensor([ids], device=self.model.device))
                    self._timed(len(ids), began)
                    job.num_tokens += len(ids)
                    job.on_progress(job.num_tokens)
            except Exception as error:
                self._finish(job, error)
                continue
            self._readings.append(job)
            if ids:
                return True
        return False

    def _finish(self, job: Job, error: BaseException | None) -> None:
        """Count a job as done and say so."""
        with self._condition:
            self._num_open[Reading if isinstance(job, Reading) else Generation] -= 1
        if isinstance(job, Generation) and error is None:
            job.note_unread()
        try:
            job.on_done(error)
        except Exception:
            log.exception("a job's end could not be said")

    def _fail_all(self, error: BaseException) -> None:
        jobs: list[Job] = [*self._rows, *self._prompts, *self._waiting, *self._readings]
        with self._condition:
            jobs += self._arrived
            self._arrived = []
        self._rows, self._batch = [], None
        for queue in (self._prompts, self._waiting, self._readings):
            queue.clear()
        for job in jobs:
            self._finish(job, error)
