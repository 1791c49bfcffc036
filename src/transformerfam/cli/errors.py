"""How a command that fails ends: one line with the reason, and a status, never a traceback."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from transformerfam.cli.output import say
from transformerfam.cli.progress import screen
from transformerfam.errors import TransformerFamError
from transformerfam.processes import INTERRUPTED, ends_as_ctrl_c

FAILED = 2
TRACEBACK = "--traceback"
TOO_LARGE = ("memory", "overflow", "too large", "allocat", "exceeds")
"""What torch says of a number for which there is no room."""


class ErrorsInOneLine(TyperGroup):
    """Turn every error into one red line and exit status 2; `--traceback`, anywhere, shows where it came from."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--traceback` out of a command line, and parse the rest."""
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta[TRACEBACK] = TRACEBACK in options
        with _in_one_line(ctx.meta[TRACEBACK]):  # help is printed here
            rest: list[str] = super().parse_args(ctx, [a for a in options if a != TRACEBACK] + args[len(options) :])
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand, and write out what it printed."""
        with _in_one_line(ctx.meta[TRACEBACK]), ends_as_ctrl_c():
            result = super().invoke(ctx)
            if sys.stdout is not None:  # it may have been closed
                sys.stdout.flush()
            return result


@contextlib.contextmanager
def _in_one_line(shows_traceback: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:  # where there was nothing to save
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from interrupt
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        if shows_traceback:
            screen().print_exception()
        line = " ".join(message.split())
        screen(soft_wrap=True).print(f"[red]error: {escape(line)}[/red]", highlight=False)
        _drop_output()
        raise typer.Exit(FAILED) from error


def message_of(error: Exception) -> str | None:
    """Return the message that a user gets for an error; None where typer prints it."""
    if type(error).__module__.partition(".")[0] in ("typer", "click"):
        return None
    if isinstance(error, TransformerFamError):
        return str(error)
    name = type(error).__name__
    if isinstance(error, BrokenPipeError):
        return "the output was closed before everything was printed; read all of it, or write it to a file"
    if isinstance(error, OSError):
        what = f"use {error.filename}" if error.filename else "read or write"
        return f"cannot {what} ({error.strerror or error}); check the path, its rights and the free space"
    is_too_large = isinstance(error, RuntimeError | ValueError | TypeError) and any(
        word in str(error).lower() for word in TOO_LARGE
    )
    if is_too_large or isinstance(error, MemoryError | OverflowError):
        return f"there is no room for this ({name}: {error}); give smaller numbers, or a machine with more memory"
    return f"unexpected {name}: {error}; please report it, with what the same command shows with {TRACEBACK}"


def _drop_output() -> None:
    """Drop what cannot be printed, so that Python's end does not try once more."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
