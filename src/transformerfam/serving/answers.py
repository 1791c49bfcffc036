"""One answer: its prompt after what a memory has read, its tokens as they come, and the memory that has read both."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable
from typing import Any

from starlette.concurrency import run_in_threadpool

from transformerfam.fam.state import FamState
from transformerfam.serving.chat import ChatTemplate, digest_of, new_turns
from transformerfam.serving.engine import Engine
from transformerfam.serving.errors import ApiError, invalid
from transformerfam.serving.jobs import Drawn, Generation, Job, Reading
from transformerfam.serving.memories import Memories
from transformerfam.serving.records import READY, Record
from transformerfam.serving.schemas import AnswerBody, ChatBody, CompletionBody, Message
from transformerfam.serving.texts import Spool
from transformerfam.serving.threads import in_thread
from transformerfam.tasks.sampling import Sampler, Sampling, TokenLogprobs
from transformerfam.tasks.speaking import TextStream
from transformerfam.tasks.text import encode, encode_rest, encode_start, end_ids


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one answer may cost.

    Attributes:
        max_tokens: of an answer at most.
        default_tokens: of a chat's answer where the request does not say.
        max_prompt_tokens: of a prompt at most.
    """

    max_tokens: int = 4096
    default_tokens: int = 512
    max_prompt_tokens: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an answer follows.

    Attributes:
        ids: its tokens.
        text: as text; "" where it came as tokens.
        digests: of the messages in it.
    """

    ids: list[int]
    text: str
    digests: list[str]


class ListSource:
    """Token ids that are all there."""

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids = list(ids)

    def take(self, num_tokens: int) -> list[int] | None:
        """Return at most so many; None after the last."""
        taken, self._ids = self._ids[:num_tokens], self._ids[num_tokens:]
        return taken or None


Piece = tuple[str, list[TokenLogprobs] | None]


class Answer:
    """An answer that is being generated: `pieces` gives it, `finish` ends it, `close` is called in any case.

    Attributes:
        num_unknown: tokens of the prompt that are words the tokenizer does not know.
        num_memory_tokens: tokens that the memory had read before.
    """

    def __init__(
        self, owner: "Answers", body: AnswerBody, record: Record | None, updates: bool, state: FamState, prompt: Prompt
    ) -> None:
        self.answers = owner
        self.body = body
        self.record = record
        self.updates = updates
        self.prompt = prompt
        self.num_memory_tokens = state.num_tokens_read
        self.stream = TextStream(owner.tokenizer, body.stops, prompt.ids)
        unknown = getattr(owner.tokenizer, "unk_token_id", None)
        self.num_unknown = 0 if unknown is None else prompt.ids.count(unknown)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        self.job = Generation(
            state,
            prompt.ids,
            Sampler(Sampling(body.temperature, body.top_p, body.seed)),
            owner.num_tokens(body),
            owner.end_ids,
            num_top_logprobs=_num_top(body),
            on_token=self._take,
            keeps_start=bool(updates and body.stops),
        )
        self.job.on_done = self._put

    # By the engine's thread

    def _take(self, drawn: Drawn) -> bool:
        text = self.stream.push(drawn.token)
        self._put((text, None if drawn.logprobs is None else [drawn.logprobs]))
        return self.stream.is_stopped

    def _put(self, event: Piece | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    # By the server's loop

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the answer as it comes: text, often none yet, and what logprobs were wanted.

        Raises:
            ApiError: the answer failed.
        """
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
        if rest := self.stream.end():
            yield rest, None

    async def finish(self) -> None:
        """Let the memory have read prompt and answer, if it is to.

        Raises:
            ApiError: 507 or 503; the memory is as it was before the request.
        """
        if self.updates:
            state = self.job.state
            if self.stream.is_stopped:  # tokens of the stop text were read, too
                state = await self._read_again()
            await run_in_threadpool(self.answers.commit, self, state)
        self.close()

    async def _read_again(self) -> FamState:
        """Return the state of what was given out alone."""
        assert self.job.start is not None
        done: asyncio.Future[BaseException | None] = self._loop.create_future()
        ids = encode(self.answers.tokenizer, self.stream.text) if self.stream.text else []
        job = Reading(self.job.start, ListSource(ids))
        job.on_done = lambda error: _resolve(self._loop, done, error)
        self.answers.engine.submit(job, is_promised=True)
        error = await done
        if error is not None:
            raise error
        return job.state

    def close(self) -> None:
        """Drop the answer if it is not complete, and let others have the memory."""
        if self.job.finish_reason is None:
            self.answers.engine.cancel(self.job)
        if self.updates and self.record is not None:
            self.updates = False
            self.answers.memories.release(self.record.id)

    def usage(self) -> dict[str, Any]:
        """Return the tokens that were read and generated for it."""
        prompt, answer = len(self.prompt.ids), self.job.num_tokens
        more = {"memory_tokens": self.num_memory_tokens, "unknown_tokens": self.num_unknown}
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer} | more


def _resolve(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]", value: Any) -> None:
    def put() -> None:
        if not future.done():
            future.set_result(value)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(put)


def _num_top(body: AnswerBody) -> int | None:
    if isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs = true; add it", "top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionBody) else None


class Answers:
    """Make answers.

    Args:
        memories: what requests may name.
        engine: generates.
        tokenizer: of the model, shared.
        template: of chats.
        limits: of one answer.
        names: what requests may call the model.
    """

    def __init__(
        self,
        memories: Memories,
        engine: Engine,
        tokenizer: Any,
        template: ChatTemplate,
        limits: Limits,
        names: Iterable[str],
    ) -> None:
        self.memories = memories
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.limits = limits
        self.names = list(names)
        self.end_ids = end_ids(tokenizer, engine.model.generation_config.eos_token_id)
        self.num_vocabulary = engine.model.get_input_embeddings().weight.shape[0]

    def num_tokens(self, body: AnswerBody) -> int:
        """Return the tokens of an answer at most.

        Raises:
            ApiError: 400, more than the server allows.
        """
        default = self.limits.default_tokens if isinstance(body, ChatBody) else 16
        wanted = (body.max_completion_tokens if isinstance(body, ChatBody) else None) or body.max_tokens or default
        if wanted > self.limits.max_tokens:
            raise invalid(f"max_tokens is {wanted}, allowed are {self.limits.max_tokens}; ask for fewer", "max_tokens")
        return wanted

    async def start(self, owner: str, body: AnswerBody) -> Answer:
        """Begin an answer.

        Raises:
            ApiError: the request is not served; nothing was changed.
        """
        if body.model not in self.names:
            raise ApiError(
                404, f"there is no model {body.model!r}, this server has {self.names[0]!r}", "model_not_found", "model"
            )
        self.num_tokens(body)
        if body.memory is None and body.memory_update:
            raise invalid("memory_update is true and no memory is named; name one", "memory")
        updates = body.memory is not None and (
            isinstance(body, ChatBody) if body.memory_update is None else body.memory_update
        )
        record = None
        if body.memory is not None:
            if updates:
                release = self.memories.release
                record = await in_thread(self.memories.claim, owner, body.memory, undo=lambda one: release(one.id))
            else:
                record = await run_in_threadpool(self.memories.get, owner, body.memory)
        try:
            state = self.memories.blank_state()
            if record is not None:
                state = await run_in_threadpool(self._state_of, record)
            prompt = await run_in_threadpool(self._prompt, body, record, state)
            answer = Answer(self, body, record, updates, state, prompt)
            self.engine.submit(answer.job)
            return answer
        except BaseException:
            if updates and record is not None:
                self.memories.release(record.id)
            raise

    def _state_of(self, record: Record) -> FamState:
        is_empty = record.state is None and record.status == READY
        return self.memories.blank_state() if is_empty else self.memories.state(record)

    def _prompt(self, body: AnswerBody, record: Record | None, state: FamState) -> Prompt:
        begins = state.num_tokens_read == 0
        if isinstance(body, ChatBody):
            prompt = self._chat_prompt(body.messages, record, begins)
        else:
            assert isinstance(body, CompletionBody)
            prompt = self._text_prompt(body, begins)
        if not prompt.ids:
            raise invalid("the prompt is empty, at least one token is required; send a prompt", "prompt")
        if len(prompt.ids) > self.limits.max_prompt_tokens:
            raise ApiError(
                413,
                f"the prompt has {len(prompt.ids)} tokens, allowed are {self.limits.max_prompt_tokens}; read it into a "
                "memory with POST /v1/memories",
                "prompt_too_long",
            )
        return prompt

    def _text_prompt(self, body: CompletionBody, begins: bool) -> Prompt:
        given: Any = body.prompt
        if isinstance(given, list) and given and not isinstance(given[0], int):
            if len(given) > 1:
                raise invalid("there are several prompts, required is one; send a request for each", "prompt")
            given = given[0]
        if isinstance(given, list):
            if any(not 0 <= token < self.num_vocabulary for token in given):
                raise invalid(f"prompt has a token id beyond the model's {self.num_vocabulary} tokens", "prompt")
            return Prompt(list(given), "", [])
        return Prompt((encode_start if begins else encode_rest)(self.tokenizer, given), given, [])

    def _chat_prompt(self, messages: list[Message], record: Record | None, begins: bool) -> Prompt:
        memory = "" if record is None else record.id
        turns = [] if record is None else record.turns
        fresh = new_turns(memory, turns, messages)
        text = (self.template.following if turns else self.template.first)(fresh)
        digests = [digest_of(memory, message.plain()["role"], message.text) for message in fresh]
        return Prompt((encode_start if begins else encode_rest)(self.tokenizer, text), text, digests)

    def commit(self, answer: Answer, state: FamState) -> Record:
        """Save a memory that has read a prompt and its answer; see `Answer.finish`."""
        record, text = answer.record, answer.stream.text
        assert record is not None
        changes: dict[str, Any] = {"status": READY, "error": None}
        if answer.prompt.digests:
            said = digest_of(record.id, "assistant", text)
            changes["turns"] = [*record.turns, *answer.prompt.digests, said]
        if record.keep_text:
            whole = answer.prompt.text or str(self.tokenizer.decode(answer.prompt.ids))
            spool = Spool.of((whole + text).encode())
            changes["texts"] = [*record.texts, self.memories.store.put_text(record.owner, record.id, spool)]
            spool.close()
        return self.memories.commit(record, state, **changes)


__all__ = ["Answer", "Answers", "Job", "Limits", "Prompt"]
