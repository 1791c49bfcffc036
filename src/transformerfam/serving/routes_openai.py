"""`/v1/models`, `/v1/completions` and `/v1/chat/completions`, as OpenAI's clients call them."""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from transformerfam.serving.answers import Answer
from transformerfam.serving.bodies import json_of
from transformerfam.serving.errors import ApiError, as_api_error
from transformerfam.serving.forms import Form
from transformerfam.serving.routes_memories import owner_of, service_of
from transformerfam.serving.schemas import AnswerBody, ChatBody, CompletionBody, checked
from transformerfam.tasks.sampling import TokenLogprobs

GONE_SECONDS = 0.1
"""How often it is looked whether a client is still there."""

router = APIRouter(prefix="/v1")
log = logging.getLogger("transformerfam.serving")


@router.get("/models")
async def models(request: Request) -> Response:
    """List the one model."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Show the model."""
    if name != service_of(request).name:
        raise ApiError(404, f"there is no model {name!r}", "model_not_found", "model")
    return JSONResponse(_model(request))


def _model(request: Request) -> dict[str, Any]:
    service = service_of(request)
    created = request.app.state.started
    own = {
        "id": service.name,
        "object": "model",
        "created": created,
        "owned_by": "transformerfam",
        "fingerprint": service.memories.fingerprint,
    }
    return own | request.app.state.facts


@router.post("/completions")
async def complete(request: Request) -> Response:
    """Continue a text, after what a memory has read; the memory stays as it is, unless `memory_update` is true."""
    return await _answer(request, CompletionBody)


@router.post("/chat/completions")
async def chat(request: Request) -> Response:
    """Answer a chat's last turn; a memory that is named has read turn and answer afterwards."""
    return await _answer(request, ChatBody)


async def _answer(request: Request, kind: type[AnswerBody]) -> Response:
    service, owner, began = service_of(request), owner_of(request), time.monotonic()
    body = checked(kind, await json_of(request, service.settings.max_body))
    answer = await service.answers.start(owner, body)
    is_chat = isinstance(body, ChatBody)
    name = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
    form = Form(name, service.name, is_chat, lambda token: str(service.answers.tokenizer.decode([token])))
    first = _Timer(service.metrics.note_first_token, began)
    if body.stream:
        return StreamingResponse(_events(answer, body, form, first), media_type="text/event-stream")
    try:
        return JSONResponse(await _unless_gone(request, _whole(answer, form, first)))
    finally:
        answer.close()


class _Timer:
    """Say once how long the first token took."""

    def __init__(self, note: Any, began: float) -> None:
        self._note, self._began, self._is_said = note, began, False

    def note(self) -> None:
        """A token is there."""
        if not self._is_said:
            self._is_said = True
            self._note(time.monotonic() - self._began)


async def _whole(answer: Answer, form: Form, first: _Timer) -> dict[str, Any]:
    """Return a whole answer."""
    text, logprobs = "", []
    async for piece, found in answer.pieces():
        first.note()
        text += piece
        logprobs += found or []
    await answer.finish()
    wanted = answer.job.num_top_logprobs is not None
    return form.body(text, logprobs if wanted else None, answer.job.finish_reason or "stop", answer.usage())


async def _unless_gone(request: Request, work: Any) -> Any:
    """Await something, unless the client is gone meanwhile.

    Raises:
        ApiError: 499, it is.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=GONE_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise ApiError(499, "the client is gone", "client_gone")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _events(answer: Answer, body: AnswerBody, form: Form, first: _Timer) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; the memory is saved before the last of them."""
    try:
        opening = form.first_chunk()
        if opening is not None:
            yield _event(opening)
        held: list[TokenLogprobs] = []  # of tokens whose text is not whole yet
        async for piece, found in answer.pieces():
            first.note()
            held += found or []
            if piece:
                wanted = answer.job.num_top_logprobs is not None
                yield _event(form.chunk(piece, held if wanted else None))
                held = []
        await answer.finish()
        yield _event(form.last_chunk(answer.job.finish_reason or "stop"))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(form.usage_chunk(answer.usage()))
        yield "data: [DONE]\n\n"
    except Exception as error:
        refusal = as_api_error(error)
        if refusal.code == "internal_error":
            log.exception("an answer failed")
        yield _event(refusal.body())
    finally:
        answer.close()


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"
