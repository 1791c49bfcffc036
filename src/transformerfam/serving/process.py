"""The process of a server: its socket, its log, and how it ends."""

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import uvicorn

from transformerfam.errors import TransformerFamError
from transformerfam.serving.app import make_app
from transformerfam.serving.service import Service

LOGGERS = ("transformerfam.serving", "uvicorn.error")
FIELDS = ("request", "method", "path", "status", "seconds", "owner", "memory", "tokens")
CLOSE_SECONDS = 10
"""Seconds that answers have to end after the engine has ended."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class JsonLines(logging.Formatter):
    """Write each record of the log as one JSON object; no text of a request is among its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        values: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        values |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(values)


def log_as_json() -> None:
    """Send the server's log to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        TransformerFamError: the address is in use, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TransformerFamError(f"cannot listen at {host} port {port} ({reason}); choose another --port") from error


class Server(uvicorn.Server):
    """Let open answers end before the process does, for so long; then they end with an error that says why.

    Args:
        service: what is served.
        grace_seconds: for how long.
    """

    def __init__(self, service: Service, grace_seconds: float) -> None:
        config = uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(grace_seconds) + CLOSE_SECONDS,
        )
        super().__init__(config)
        self.service = service
        self.grace_seconds = grace_seconds

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Take no more requests, and end the open ones."""
        self.service.is_ending = True
        end = threading.Thread(target=self.service.engine.stop, daemon=True)
        timer = asyncio.get_running_loop().call_later(self.grace_seconds, end.start)
        try:
            await super().shutdown(list(sockets) if sockets is not None else None)
        finally:
            timer.cancel()
