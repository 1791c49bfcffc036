"""Progress bars: of a reading (tokens, tokens per second, time left, bytes of state), and of a training."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transformerfam.processes import process_share

if TYPE_CHECKING:
    from transformerfam.decoder.state import ReadingState


class _Screen:
    """Standard error that drops what it cannot write: a full disk or a closed pipe never ends what is being shown."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, if it can be written; what the encoding lacks is written as an escape."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if it can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def screen(soft_wrap: bool = False) -> Console:
    """Return standard error for bars and messages; results alone go to standard output."""
    return Console(file=cast(IO[str], _Screen(sys.stderr or io.StringIO())), soft_wrap=soft_wrap)


@contextlib.contextmanager
def reading_bar(
    num_tokens: int | None, description: str = "reading"
) -> Iterator[Callable[[int, int | None, "ReadingState"], None]]:
    """Show a bar on standard error and yield the function that moves it.

    Args:
        num_tokens: tokens to be read; None where that is unknown.
        description: text in front of the bar.

    Yields:
        A function of (tokens done, tokens in all, state).
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("state {task.fields[size]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen(), disable=process_share()[0] > 0) as progress:
        task = progress.add_task(description, total=num_tokens, rate="", size="")

        def update(done: int, total: int | None, state: "ReadingState") -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f} tokens/s" if speed else ""
            progress.update(task, completed=done, total=total, rate=rate, size=decimal(state.num_bytes))

        yield update


@contextlib.contextmanager
def tokens_bar(description: str) -> Iterator[Callable[[int, int | None, "ReadingState"], None]]:
    """Show a `reading_bar` that starts with the first update, which is the first to know how many tokens there are.

    Args:
        description: text in front of the bar.

    Yields:
        A function of (tokens done, tokens in all, state).
    """
    with contextlib.ExitStack() as stack:
        move: Callable[..., None] | None = None

        def update(done: int, total: int | None, state: "ReadingState") -> None:
            nonlocal move
            if move is None:
                move = stack.enter_context(reading_bar(total, description))
            move(done, total, state)

        yield update


@contextlib.contextmanager
def questions_bar(num_questions: int | None, description: str) -> Iterator[Callable[[float], None]]:
    """Show a bar of questions on standard error and yield the function that moves it.

    Args:
        num_questions: all questions, those of earlier runs included; None where the number is not known.
        description: text in front of the bar.

    Yields:
        A function of the questions done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("questions ETA"))
    with Progress(*columns, TimeRemainingColumn(), console=screen(), disable=process_share()[0] > 0) as progress:
        task = progress.add_task(description, total=num_questions)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def training_bar(num_steps: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a bar of training steps on standard error and yield the function that moves it.

    Args:
        num_steps: steps to be done, all runs together.

    Yields:
        A function of a step's row of the log.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps {task.description} ETA"))
    is_silent = process_share()[0] > 0
    with Progress(*columns, TimeRemainingColumn(), console=screen(), disable=is_silent) as progress:
        task = progress.add_task("", total=num_steps)

        def update(row: Mapping[str, Any]) -> None:
            keys = "-" if row["key_accuracy"] is None else f"{row['key_accuracy']:.2f}"
            text = (
                f"stage {row['stage']}, loss {row['loss']:.3f}, keys {keys}, {row['tokens_per_second']:,.0f} tokens/s"
            )
            progress.update(task, completed=row["step"], description=text)

        yield update


@contextlib.contextmanager
def study_bar(seconds: float | None, steps: int | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a bar of a study on standard error and yield the function that moves it.

    Where standard error is no terminal, each look at the held-out lessons is a line.

    Args:
        seconds: time of training, all runs together; None where steps alone count.
        steps: steps to be done, all runs together; None where time alone counts.

    Yields:
        A function of a step's row of the log.
    """
    console = screen(soft_wrap=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TextColumn("ETA {task.fields[left]}"))
    with Progress(*columns, console=console, disable=process_share()[0] > 0) as progress:
        task = progress.add_task("", total=1.0, left="-")
        held_out = "-"

        def update(row: Mapping[str, Any]) -> None:
            nonlocal held_out
            done = row["step"] + 1
            shares = [row["seconds"] / seconds] if seconds else []
            shares += [done / steps] if steps else []
            share = min(1.0, max(shares, default=0.0))
            left = f"{row['seconds'] * (1 - share) / share / 60:.1f} min" if share else "-"
            if row["held_out_loss"] is not None:
                held_out = f"{row['held_out_loss']:.3f}"
            text = f"step {done:,}, loss {row['loss']:.3f}, held out {held_out}"
            progress.update(task, completed=share, description=text, left=left)
            if row["held_out_loss"] is not None and not console.is_terminal:
                console.print(f"{text}, ETA {left}", highlight=False)

        yield update
