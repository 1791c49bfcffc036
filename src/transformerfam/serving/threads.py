"""Work in threads for requests that may end before it does."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

Made = TypeVar("Made")


async def in_thread(make: Callable[..., Made], *args: Any, undo: Callable[[Made], Any]) -> Made:
    """Return what a function makes in a thread; if the request is cancelled meanwhile, undo it once it is made.

    Args:
        make: the function.
        *args: of the function.
        undo: takes what it made, in a thread.
    """
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(run_in_threadpool(make, *args))

    def end(done: "asyncio.Future[Made]") -> None:
        if not done.cancelled() and done.exception() is None:
            loop.run_in_executor(None, undo, done.result())

    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(end)
        raise
