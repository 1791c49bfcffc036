"""Which tokens a memory looks at, block by block: a text is read again, or on trial, and no memory changes.

Nothing of it is noted while texts are read as usual. Whoever wants the picture pays for another reading, which takes
turns with the others; each block is handed on as soon as it is read, so that a text of any length needs no more room
than `MOST_WAITING` blocks.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.serving.errors import ApiError
from transformerfam.serving.jobs import Reading, TokenSource
from transformerfam.serving.records import READY, Record
from transformerfam.serving.schemas import AttentionBody
from transformerfam.serving.service import Service
from transformerfam.serving.texts import Spool, TokenFeed
from transformerfam.tasks.speaking import TextStream
from transformerfam.tools.attention_record import read_end_of_block, require_recordable

MOST_WAITING = 4
"""Blocks that wait for the client; then the reading waits."""
DIGITS = 5
"""Decimal places of a weight."""


@dataclasses.dataclass(frozen=True)
class SeenBlock:
    """How the FAM rows looked at one block.

    Attributes:
        block_idx: its number in all that the memory has read, from 0.
        ids: its tokens; None for those that were read before the recording began.
        weights: of every layer, `(F, block_size)`, mean over heads; None of layers without FAM.
    """

    block_idx: int
    ids: list[int | None]
    weights: list[Tensor | None]

    def body(self, texts: Sequence[str | None], with_layers: bool) -> dict[str, Any]:
        """Return what a client gets.

        Args:
            texts: of the tokens.
            with_layers: every layer's weights besides their mean.
        """
        kept = [(layer_idx, weights) for layer_idx, weights in enumerate(self.weights) if weights is not None]
        mean_T = torch.stack([weights.mean(0) for _, weights in kept]).mean(0)
        shown: dict[str, Any] = {
            "object": "memory.attention.block",
            "block": self.block_idx,
            "first_token": self.block_idx * len(self.ids),
            "tokens": list(texts),
            "weights": _rounded(mean_T),
            "share": round(float(mean_T.sum()), DIGITS),
        }
        if with_layers:
            shown["layers"] = [
                {
                    "layer": layer_idx,
                    "weights": _rounded(weights.mean(0)),
                    "share_of_rows": _rounded(weights.sum(-1)),
                }
                for layer_idx, weights in kept
            ]
        return shown


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


class Recording(Reading):
    """A text that is read to see what the FAM rows look at; it costs more than a reading where a block is complete.

    Args:
        state: see `Job`; it is dropped afterwards.
        source: the text's ids.
        first_block: of the text, from 0, that is recorded.
        num_blocks: that are recorded at most.
        on_block: takes each, by the engine's thread.
        is_full: whether blocks wait for the client.

    Attributes:
        num_recorded: blocks so far.
    """

    def __init__(
        self,
        state: FamState,
        source: TokenSource,
        first_block: int,
        num_blocks: int,
        on_block: Callable[[SeenBlock], None],
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(state, self)
        self.text = source
        self.first_block = first_block
        self.num_blocks = num_blocks
        self.on_block = on_block
        self.is_full = is_full
        self.num_recorded = 0
        self._num_passed = 0  # blocks in front of the first one that is recorded
        self._ids: list[int | None] = [None] * state.block_fill[0]

    @property
    def is_over(self) -> bool:
        """Whether all blocks that are wanted are recorded."""
        return self.num_recorded >= self.num_blocks

    def take(self, num_tokens: int) -> list[int] | None:
        """Return ids of the text, as a `TokenSource`, at the client's pace; None once all that is wanted is there."""
        if self.is_over:
            return None
        return [] if self.is_full() else self.text.take(num_tokens)

    def read(self, model: Any, ids_1T: Tensor) -> None:
        """Read a slice, and record the block that it completes."""
        while ids_1T.shape[1]:  # a token that an answer has left unread may reach beyond the block
            room = self.state.config.block_size - self.state.block_fill[0]
            self._read_part(model, ids_1T[:, :room], completes=ids_1T.shape[1] >= room)
            ids_1T = ids_1T[:, room:]

    def _read_part(self, model: Any, ids_1T: Tensor, completes: bool) -> None:
        self._ids += ids_1T[0].tolist()
        if not completes:
            model.read(ids_1T, self.state)
            return
        block_idx, ids, self._ids = self.state.num_blocks_per_row[0], self._ids, []
        if self._num_passed < self.first_block or self.is_over:
            self._num_passed += 1
            model.read(ids_1T, self.state)
            return
        weights = read_end_of_block(model, ids_1T, self.state)
        self.num_recorded += 1
        self.on_block(SeenBlock(block_idx, ids, weights))


class KeptTexts:
    """The ids of several texts, one after the other, each opened by a thread when the one before is read.

    Args:
        openers: give the texts.
    """

    def __init__(self, openers: Sequence[Callable[[], TokenFeed]]) -> None:
        self._openers = list(openers)
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="kept text")
        self._next: Future[TokenFeed] | None = None

    def take(self, num_tokens: int) -> list[int] | None:
        """Return at most so many ids; see `TokenSource`."""
        if self._next is None:
            if not self._openers:
                return None
            self._next = self._opener.submit(self._openers.pop(0))
        if not self._next.done():
            return []
        ids = self._next.result().take(num_tokens)
        if ids is None:
            self._next.result().close()
            self._next = None
            return []
        return ids

    def close(self) -> None:
        """End the threads and remove what was opened."""
        self._openers = []
        if self._next is not None:
            self._next.add_done_callback(_close_feed)
        self._opener.shutdown(wait=False)


def _close_feed(opened: "Future[TokenFeed]") -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()


class Look:
    """One request: `blocks` gives them, `close` is called in any case.

    Args:
        service: reads.
        state: that the text follows.
        source: of the text's ids.
        body: of the request.
    """

    def __init__(self, service: Service, state: FamState, source: KeptTexts, body: AttentionBody) -> None:
        self._service = service
        self._source = source
        self._with_layers = body.layers
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[SeenBlock | BaseException | None] = asyncio.Queue()
        self._stream = TextStream(service.answers.tokenizer)
        self.job = Recording(
            state,
            source,
            body.first_block,
            body.num_blocks,
            self._put,
            lambda: self._events.qsize() >= MOST_WAITING,
        )
        self.job.on_done = self._put
        try:
            service.engine.submit(self.job)
        except ApiError:
            source.close()
            raise

    def _put(self, event: SeenBlock | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def blocks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield every block as it is read, and at last how far the text was read.

        Raises:
            ApiError: the reading failed.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield await run_in_threadpool(self._body, event)
        yield {
            "object": "memory.attention",
            "num_blocks": self.job.num_recorded,
            "num_tokens_read": self.job.num_tokens,
            "is_whole": not self.job.is_over,
        }

    def _body(self, block: SeenBlock) -> dict[str, Any]:
        texts = [None if token is None else self._stream.push(token) for token in block.ids]
        self._stream.text = ""  # of all blocks, which nobody needs
        return block.body(texts, self._with_layers)

    def close(self) -> None:
        """Drop the reading if it is not over."""
        self._service.engine.cancel(self.job)
        self._source.close()


async def look(service: Service, owner: str, memory: str, body: AttentionBody) -> Look:
    """Begin to read a memory's kept texts again, or another text after what it has read.

    Raises:
        ApiError: 404; 409, it keeps no text, is not read yet or is of other weights; 400, its model cannot be recorded;
            429; 503.
    """
    _require_rows(service)
    record = await run_in_threadpool(service.memories.get, owner, memory)
    service.memories.states.require_own_weights(record)
    if body.text is not None:
        is_empty = record.state is None and record.status == READY
        state = service.memories.blank_state()
        if not is_empty:
            state = await run_in_threadpool(service.memories.state, record)
        text, begins = body.text, state.num_tokens_read == 0
        openers = [lambda: _feed(service, Spool.of(text.encode()), begins, record.allow_unknown)]
    else:
        _require_texts(record)
        state = service.memories.blank_state()
        openers = [_opener(service, record, name, is_first=place == 0) for place, name in enumerate(record.texts)]
    return Look(service, state, KeptTexts(openers), body)


def _opener(service: Service, record: Record, name: str, is_first: bool) -> Callable[[], TokenFeed]:
    def opened() -> TokenFeed:
        spool = service.memories.store.text(record.owner, record.id, name)
        return _feed(service, spool, is_first, allow_unknown=True)  # it was read before

    return opened


def _feed(service: Service, spool: Spool, begins: bool, allow_unknown: bool) -> TokenFeed:
    return TokenFeed(spool, service.answers.tokenizer, begins=begins, allow_unknown=allow_unknown)


def _require_rows(service: Service) -> None:
    """Refuse a model without FAM, or one whose attention is not seen.

    Raises:
        TransformerFamError: it is such a model.
    """
    if service.engine.model.fam_config.fam_length == 0:
        raise TransformerFamError("the model has no FAM rows, so none looks at a text; serve one with fam_length >= 1")
    require_recordable(service.engine.model)


def _require_texts(record: Record) -> None:
    """Refuse a memory whose text is not there.

    Raises:
        ApiError: 409.
    """
    if record.pending:
        raise ApiError(
            409, f"memory {record.id} is not read yet; wait until its status is ready", "memory_not_ready", "memory", 5
        )
    if not record.texts:
        raise ApiError(
            409,
            f"memory {record.id} keeps no text that could be read again; send a text, or make a memory with keep_text "
            "= true",
            "text_not_kept",
            "memory",
        )
