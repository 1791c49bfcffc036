"""Bodies of requests as they arrive: counted, decoded and refused before they are whole."""

import codecs
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from transformerfam.serving.errors import ApiError, invalid
from transformerfam.serving.texts import Spool


def is_json(request: Request) -> bool:
    """Return whether a body says that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        raise ApiError(
            415, "a multipart form is not read; send the text itself as the body, or JSON", "unsupported_media_type"
        )
    return kind == "application/json" or kind.endswith("+json")


async def pieces_of(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield a body as it arrives.

    Raises:
        ApiError: 413, it is larger than `limit` bytes; 499, the client is gone.
    """
    error = ApiError(413, f"the body is larger than {limit:,} bytes, which is the limit; send less", "body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit:
        raise error
    num_bytes = 0
    try:
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > limit:
                raise error
            yield piece
    except ClientDisconnect as gone:
        raise ApiError(499, "the client is gone", "client_gone") from gone


async def json_of(request: Request, limit: int) -> Any:
    """Return the JSON value of a body.

    Raises:
        ApiError: 400, it is none, or not UTF-8; 413.
    """
    content = b"".join([piece async for piece in pieces_of(request, limit)])
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 at byte {error.start}; send UTF-8", code="not_utf8") from error
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise invalid(
            "the body has half a character (\\ud800 to \\udfff alone); send UTF-8", code="not_utf8"
        ) from error
    except RecursionError as error:
        raise invalid("the body is nested too deeply; send plain JSON", code="invalid_json") from error
    except ValueError as error:
        raise invalid(f"the body is no JSON ({error}); correct it", code="invalid_json") from error


async def text_into(request: Request, spool: Spool, limit: int) -> None:
    """Write a text into a spool as it arrives.

    Raises:
        ApiError: 400, it is empty or not UTF-8; 413; 499; 507, the server's disk is full.
    """
    decoder, num_bytes = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        async for piece in pieces_of(request, limit):
            decoder.decode(piece)
            num_bytes += len(piece)
            await run_in_threadpool(spool.write, piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = max(0, num_bytes - len(error.object) + error.start) if num_bytes else error.start
        message = f"the text is not UTF-8 (byte 0x{error.object[error.start]:02x} near position {place})"
        raise invalid(f"{message}; convert it first, for example with iconv -t UTF-8", code="not_utf8") from error
    except OSError as error:
        raise ApiError(
            507, f"the server has no room for the text ({error.strerror}); free space", "disk_full"
        ) from error
    if not num_bytes:
        raise invalid("the text is empty, at least one character is required; send a text", "text")


async def file_into(request: Request, path: Path, limit: int) -> None:
    """Write a body into a file as it arrives; errors as `text_into`."""
    try:
        with path.open("wb") as file:
            async for piece in pieces_of(request, limit):
                await run_in_threadpool(file.write, piece)
    except OSError as error:
        raise ApiError(
            507, f"the server has no room for the file ({error.strerror}); free space", "disk_full"
        ) from error
