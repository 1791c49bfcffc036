"""The HTTP of a server: routes, errors in one form, a line of log and counters for every request."""

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from transformerfam.serving import routes_memories, routes_openai, routes_page
from transformerfam.serving.errors import ApiError, as_api_error
from transformerfam.serving.facts import facts_of
from transformerfam.serving.service import Service

log = logging.getLogger("transformerfam.serving")


def make_app(service: Service) -> FastAPI:
    """Return the application of a service, which it starts and stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(title="transformerfam", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.state.started = int(time.time())
    app.state.facts = facts_of(service)
    app.include_router(routes_memories.router)
    app.include_router(routes_openai.router)
    routes_page.add_page(app)

    @app.get("/health")
    async def health() -> Response:
        """Say whether the server takes requests."""
        status = "ending" if service.is_ending else "ok"
        return JSONResponse({"status": status, "model": service.name}, 503 if service.is_ending else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return what Prometheus collects."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_middleware(Gate, service=service)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer an error in OpenAI's form."""
    if isinstance(error, HTTPException):
        what = {404: "there is no such path", 405: "the path does not take this method"}.get(error.status_code)
        refusal = ApiError(error.status_code, f"{what or error.detail}; look at docs/howto/serving.md", "no_such_path")
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = str(first["loc"][-1])
        refusal = ApiError(400, f"{param}: {first['msg']}; correct the request", "invalid_value", param)
    else:
        refusal = as_api_error(error)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


OPEN_PATHS = ("/health", "/metrics")
"""What is served without a key, besides the page's files."""


class Gate:
    """Let requests with a key in, give each an id, answer what its handlers raise, and note how it ended.

    Args:
        app: what answers.
        service: whose keys are checked and whose metrics count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, status = secrets.token_hex(8), time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        state = scope.setdefault("state", {})
        try:
            if scope["path"] not in OPEN_PATHS and not routes_page.is_open(scope):
                state["owner"] = self.service.owner(Headers(scope=scope).get("authorization"))
            await self.app(scope, receive, note)
        except Exception as error:
            refusal = as_api_error(error)
            if refusal.code == "internal_error":
                log.error("a request failed", exc_info=error, extra={"request": request_id})
            if status == 0:
                await JSONResponse(refusal.body(), refusal.status, refusal.headers())(scope, receive, note)
        finally:
            path = str(getattr(scope.get("route"), "path", "other"))
            seconds = time.monotonic() - began
            self.service.metrics.note_request(scope["method"], path, status, seconds)
            fields: dict[str, Any] = {"request": request_id, "method": scope["method"], "path": path, "status": status}
            log.info("request", extra=fields | {"seconds": round(seconds, 3), "owner": state.get("owner")})
