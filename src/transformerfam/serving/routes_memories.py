"""`/v1/memories`: texts in, states out."""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from transformerfam.serving.bodies import file_into, is_json, json_of, text_into
from transformerfam.serving.errors import ApiError, invalid
from transformerfam.serving.records import READING, READY, Record
from transformerfam.serving.schemas import AppendBody, ChangeBody, ForkBody, MemoryBody, MemoryOptions, checked
from transformerfam.serving.service import Service
from transformerfam.serving.texts import Spool
from transformerfam.serving.threads import in_thread

PROGRESS_SECONDS = 0.2
LARGEST_KEY = 200

router = APIRouter(prefix="/v1/memories")


def service_of(request: Request) -> Service:
    """Return the server's parts."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """Return who sends a request, which `Gate` has found out."""
    owner: str = request.state.owner
    return owner


def _key_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= LARGEST_KEY:
        raise invalid(f"Idempotency-Key has {len(key)} characters, allowed are 1 to {LARGEST_KEY}")
    return key


def _public(service: Service, record: Record, status: int = 200) -> JSONResponse:
    shown = record.public() | {"num_tokens_read": service.readings.num_tokens_of(record)}
    return JSONResponse(shown, status)


def _query(request: Request) -> dict[str, Any]:
    flags = {"true": True, "1": True, "false": False, "0": False}
    values: dict[str, Any] = dict(request.query_params)
    for name in ("keep_text", "allow_unknown"):
        if name in values:
            values[name] = flags.get(values[name].lower(), values[name])
    return values


@router.post("")
async def create(request: Request) -> Response:
    """Make a memory of a text: of JSON, or of a body of any length that is the text, with options in the query."""
    service, owner, key = service_of(request), owner_of(request), _key_of(request)
    async with _with_key(service, owner, key) as known:
        return _public(service, known) if known is not None else await _create(request, service, owner, key)


@contextlib.asynccontextmanager
async def _with_key(service: Service, owner: str, key: str | None) -> AsyncIterator[Record | None]:
    """Let nobody else serve a request with this key during the body; yield the memory that one has made before."""
    held = service.memories.one.with_key(owner, key)
    await in_thread(held.__enter__, undo=lambda _: held.__exit__(None, None, None))
    try:
        yield await run_in_threadpool(service.memories.known, owner, key)
    finally:
        held.__exit__(None, None, None)


async def _create(request: Request, service: Service, owner: str, key: str | None) -> Response:
    text: str | None = None
    if is_json(request):
        body = checked(MemoryBody, await json_of(request, service.settings.max_body))
        options: MemoryOptions = body
        text = body.text
        if not text:
            record = await run_in_threadpool(_create_empty, service, owner, options, key)
            return _public(service, record, 201)
    else:
        options = checked(MemoryOptions, _query(request))
    record = await in_thread(_add, service, owner, options, key, undo=lambda added: _drop(service, added))
    return _public(service, await _read(request, service, record, text, None, key), 201)


def _keys(key: str | None) -> list[str]:
    return [] if key is None else [key]


def _expires(service: Service, ttl_seconds: int | None) -> int | None:
    return None if ttl_seconds is None else service.memories.now() + ttl_seconds


def _add(service: Service, owner: str, options: MemoryOptions, key: str | None) -> Record:
    fields = {"name": options.name, "keep_text": options.keep_text, "allow_unknown": options.allow_unknown}
    return service.memories.add(owner, expires=_expires(service, options.ttl_seconds), keys=_keys(key), **fields)


def _drop(service: Service, record: Record) -> None:
    service.memories.forget(record)
    service.memories.release(record.id)


def _create_empty(service: Service, owner: str, options: MemoryOptions, key: str | None) -> Record:
    memories = service.memories
    record = _add(service, owner, options, key)
    try:
        return memories.write(record, status=READY)
    except BaseException:
        memories.forget(record)
        raise
    finally:
        memories.release(record.id)


async def _read(
    request: Request, service: Service, record: Record, text: str | None, state: Any, key: str | None
) -> Record:
    """Read a text into a claimed memory while it arrives; return the record once the text is whole and kept."""
    spool = Spool()
    gone = ApiError(499, "the client is gone", "client_gone")
    begin, refuse = service.readings.begin, service.readings.refuse
    reading = await in_thread(begin, record, spool, state, undo=lambda begun: refuse(begun, gone))
    try:
        if text is None:
            await text_into(request, spool, service.settings.max_upload)
        else:
            await run_in_threadpool(spool.write, text.encode())
        spool.end()
    except BaseException as error:
        refusal = error if isinstance(error, Exception) else gone
        await asyncio.shield(run_in_threadpool(refuse, reading, refusal))
        raise
    new_key = key if key not in record.keys else None
    return await run_in_threadpool(service.readings.acknowledge, reading, new_key)


@router.get("")
async def show_all(request: Request, limit: int = 100, after: str | None = None) -> Response:
    """List the key's memories, the newest first; `after` is the id of the last one of the page before."""
    service, owner = service_of(request), owner_of(request)
    if not 1 <= limit <= 1000:
        raise invalid(f"limit is {limit}, allowed are 1 to 1000; change it", "limit")
    records = await run_in_threadpool(service.memories.all_of, owner)
    ids = [record.id for record in records]
    if after is not None and after not in ids:
        raise invalid(f"there is no memory {after!r} to begin after", "after")
    first = 0 if after is None else ids.index(after) + 1
    page = records[first : first + limit]
    shown = [record.public() | {"num_tokens_read": service.readings.num_tokens_of(record)} for record in page]
    return JSONResponse({"object": "list", "data": shown, "has_more": first + limit < len(records)})


@router.post("/state")
async def upload(request: Request) -> Response:
    """Make a memory of the file of a state, which is the body; options are in the query."""
    service, owner, key = service_of(request), owner_of(request), _key_of(request)
    async with _with_key(service, owner, key) as known:
        return _public(service, known) if known is not None else await _upload(request, service, owner, key)


async def _upload(request: Request, service: Service, owner: str, key: str | None) -> Response:
    options = checked(MemoryOptions, _query(request))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        await file_into(request, path, service.settings.max_upload)
        state = await run_in_threadpool(service.memories.load, path)
    record = await run_in_threadpool(_keep, service, owner, options, key, state)
    return _public(service, record, 201)


def _keep(service: Service, owner: str, options: MemoryOptions, key: str | None, state: Any) -> Record:
    memories = service.memories
    record = _add(service, owner, options, key)
    try:
        return memories.commit(record, state, status=READY)
    except BaseException:
        memories.forget(record)
        raise
    finally:
        memories.release(record.id)


@router.get("/{memory}")
async def show(request: Request, memory: str) -> Response:
    """Show one memory."""
    service, owner = service_of(request), owner_of(request)
    return _public(service, await run_in_threadpool(service.memories.get, owner, memory))


@router.patch("/{memory}")
async def change(request: Request, memory: str) -> Response:
    """Rename a memory, or change when it ends."""
    service, owner = service_of(request), owner_of(request)
    body = checked(ChangeBody, await json_of(request, service.settings.max_body))
    changes: dict[str, Any] = {}
    if "name" in body.model_fields_set:
        changes["name"] = body.name
    if "ttl_seconds" in body.model_fields_set:
        changes["expires"] = _expires(service, body.ttl_seconds)

    def write() -> Record:
        record = service.memories.get(owner, memory)
        return service.memories.write(record, **changes) if changes else record

    return _public(service, await run_in_threadpool(write))


@router.delete("/{memory}")
async def delete(request: Request, memory: str) -> Response:
    """Delete a memory: its state in RAM and in the store, its texts, and what is being read into it."""
    service, owner = service_of(request), owner_of(request)

    def remove() -> None:
        service.memories.get(owner, memory)
        service.memories.delete(owner, memory)
        service.readings.cancel(memory)

    await run_in_threadpool(remove)
    return JSONResponse({"id": memory, "object": "memory.deleted", "deleted": True})


@router.post("/{memory}/append")
async def append(request: Request, memory: str) -> Response:
    """Let a memory read more text: JSON, or a body of any length that is the text."""
    service, owner, key = service_of(request), owner_of(request), _key_of(request)
    async with _with_key(service, owner, key) as known:
        if known is not None and known.id == memory:
            return _public(service, known)
        return await _append(request, service, owner, memory, key)


async def _append(request: Request, service: Service, owner: str, memory: str, key: str | None) -> Response:
    text = None
    if is_json(request):
        text = checked(AppendBody, await json_of(request, service.settings.max_body)).text
    release = service.memories.release
    record, state = await in_thread(_claim, service, owner, memory, undo=lambda claimed: release(claimed[0].id))
    return _public(service, await _read(request, service, record, text, state, key), 202)


def _claim(service: Service, owner: str, memory: str) -> tuple[Record, Any]:
    memories = service.memories
    record = memories.claim(owner, memory)
    try:
        is_empty = record.state is None and record.status == READY
        return record, memories.blank_state() if is_empty else memories.state(record)
    except BaseException:
        memories.release(memory)
        raise


@router.post("/{memory}/fork")
async def fork(request: Request, memory: str) -> Response:
    """Make another memory that has read what this one has."""
    service, owner = service_of(request), owner_of(request)
    content = await request.body()
    name = checked(ForkBody, await json_of(request, service.settings.max_body)).name if content else None
    return _public(service, await run_in_threadpool(service.memories.fork, owner, memory, name), 201)


@router.get("/{memory}/progress")
async def progress(request: Request, memory: str) -> Response:
    """Tell how far a reading is, by server-sent events, until it is ready, failed or deleted."""
    service, owner = service_of(request), owner_of(request)
    await run_in_threadpool(service.memories.get, owner, memory)

    async def events() -> AsyncIterator[str]:
        last = None
        while not service.is_ending:
            try:
                record = await run_in_threadpool(service.memories.get, owner, memory)
            except ApiError as error:
                yield f"data: {json.dumps(error.body())}\n\n"
                return
            shown = record.public() | {"num_tokens_read": service.readings.num_tokens_of(record)}
            if shown != last:
                yield f"data: {json.dumps(shown)}\n\n"
                last = shown
            if record.status != READING:
                return
            await asyncio.sleep(PROGRESS_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream")


@router.get("/{memory}/state")
async def download(request: Request, memory: str) -> Response:
    """Return the file of a memory's state, which `FamState.load` and `fam generate --state` take."""
    service, owner = service_of(request), owner_of(request)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"{memory}.fam.safetensors"

    def write() -> None:
        service.memories.state(service.memories.get(owner, memory)).save(path)

    try:
        await run_in_threadpool(write)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(
        path, media_type="application/octet-stream", filename=path.name, background=BackgroundTask(folder.cleanup)
    )
