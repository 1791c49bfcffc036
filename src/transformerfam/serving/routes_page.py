"""The page at `/`: its files, which need no key and load nothing from elsewhere, and where a memory looks."""

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from transformerfam.serving.attention import Look, look
from transformerfam.serving.bodies import json_of
from transformerfam.serving.errors import as_api_error
from transformerfam.serving.routes_memories import owner_of, service_of
from transformerfam.serving.schemas import AttentionBody, checked

FOLDER = Path(__file__).parent / "page"
POLICY = {
    "default-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "object-src": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "lit-html",
}
"""What the page may do: load from its own server, and make no markup of text."""
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the browser checks each time whether it has changed
}

router = APIRouter()
log = logging.getLogger("transformerfam.serving")


class Files(StaticFiles):
    """The page's files, each with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Return a file, or that it has not changed."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Let an application serve the page."""
    app.include_router(router)
    app.mount("/page", Files(directory=FOLDER), name="page")


def is_open(scope: Scope) -> bool:
    """Return whether a request is for one of the page's files, which need no key."""
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Return the page."""
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.post("/v1/memories/{memory}/attention")
async def attention(request: Request, memory: str) -> Response:
    """Tell which tokens the FAM rows look at, block by block, by server-sent events; no memory changes."""
    service, owner = service_of(request), owner_of(request)
    content = await request.body()
    body = checked(AttentionBody, await json_of(request, service.settings.max_body) if content else {})
    found = await look(service, owner, memory, body)
    return StreamingResponse(_events(found), media_type="text/event-stream")


async def _events(found: Look) -> AsyncIterator[str]:
    try:
        async for block in found.blocks():
            yield f"data: {json.dumps(block)}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:
        refusal = as_api_error(error)
        if refusal.code == "internal_error":
            log.exception("a text could not be looked at")
        yield f"data: {json.dumps(refusal.body())}\n\n"
    finally:
        found.close()
