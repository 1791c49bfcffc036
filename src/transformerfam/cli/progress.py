"""Progress on standard error: a bar on a terminal, else a line every half minute; neither where a command is quiet."""

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from transformerfam.cli.verbosity import LEVEL
from transformerfam.processes import process_share

if TYPE_CHECKING:
    from transformerfam.decoder.state import ReadingState

SECONDS_BETWEEN_LINES = 30.0
BAR, NARROW = 12, 60
"""Columns of a bar, and those of a terminal below which it is left out, for the numbers' sake."""


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


class Amount:
    """How much of something is done.

    Args:
        description: what is being done.
        unit: what is counted, in the plural; "%" is a share.
        total: how much there is to do; None where that is not known.
        shows_rate: whether units per second are of interest.
    """

    def __init__(self, description: str, unit: str, total: float | None, shows_rate: bool = True) -> None:
        self.description, self.unit, self.total, self.shows_rate = description, unit, total, shows_rate
        self.done, self.detail = 0.0, ""
        self._begin: tuple[float, float] | None = None
        self._now = 0.0

    def move(self, done: float, total: float | None, detail: str) -> None:
        """Note how much is done; what was done before the first note counts for no rate."""
        self.done, self.total, self.detail, self._now = done, total, detail, time.monotonic()
        if self._begin is None:
            self._begin = self._now, done

    @property
    def rate(self) -> float | None:
        """Units per second; None before there is one."""
        if self._begin is None or self.done <= self._begin[1] or self._now <= self._begin[0]:
            return None
        return (self.done - self._begin[1]) / (self._now - self._begin[0])

    @property
    def counted(self) -> str:
        """What is done of what."""
        if self.unit == "%":
            return f"{self.done:.0f} %"
        of_all = "" if self.total is None else f"/{self.total:,.0f}"
        return f"{self.done:,.0f}{of_all} {self.unit}"

    @property
    def speed(self) -> str:
        """The rate, as a text."""
        if self.rate is None or not self.shows_rate:
            return ""
        return f"{self.rate:,.0f} {self.unit}/s" if self.rate >= 10 else f"{self.rate:.2g} {self.unit}/s"

    @property
    def left(self) -> str:
        """The time left, as a text."""
        if not self.rate or self.total is None:
            return ""
        return f"ETA {timedelta(seconds=round(max(0.0, self.total - self.done) / self.rate))}"

    def text(self, width: int | None = None) -> str:
        """Return what is done, the rate, the time left and what else there is, as much of it as fits.

        Args:
            width: columns; None: any number.
        """
        parts = [part for part in (self.counted, self.left, self.speed) if part]
        while width is not None and len(parts) > 1 and len(", ".join(parts)) > width:
            parts.pop()
        text = ", ".join([*parts, self.detail] if self.detail else parts)
        return text if width is None or len(text) <= width else f"{text[: max(0, width - 1)]}\N{HORIZONTAL ELLIPSIS}"


@contextlib.contextmanager
def follow(
    description: str, unit: str, total: float | None = None, shows_rate: bool = True
) -> Iterator[Callable[[float, float | None, str], None]]:
    """Show how something proceeds, and yield the function that says so.

    Args:
        description: what is being done.
        unit: what is counted, in the plural; "%" is a share.
        total: how much there is to do; None where that is not known.
        shows_rate: whether units per second are of interest.

    Yields:
        A function of (how much is done, how much there is to do, what else is to be shown).
    """
    amount, console = Amount(description, unit, total, shows_rate), screen()
    if LEVEL.is_quiet or process_share()[0] > 0:
        yield amount.move
    elif console.is_terminal and not console.is_dumb_terminal:
        bars = [BarColumn(bar_width=BAR)] if console.width >= NARROW else []
        room = console.width - (BAR + 1) * len(bars) - 1
        with Progress(*bars, TextColumn("{task.description}"), console=console) as progress:
            task = progress.add_task(description, total=total)

            def update(done: float, total: float | None, detail: str) -> None:
                amount.move(done, total, detail)
                named = f"{description}: "
                if len(named) + len(f"{amount.counted}, {amount.left}") > room:
                    named = ""
                shown = escape(named + amount.text(room - len(named)))
                progress.update(task, completed=done, total=total, description=shown)

            yield update
    else:
        yield _lines_of(amount)


def _lines_of(amount: Amount) -> Callable[[float, float | None, str], None]:
    """Return a function that notes an amount, and prints a line of it every half minute."""
    last = time.monotonic()

    def update(done: float, total: float | None, detail: str) -> None:
        nonlocal last
        amount.move(done, total, detail)
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            screen(soft_wrap=True).print(f"{amount.description}: {amount.text()}", highlight=False, markup=False)

    return update


@contextlib.contextmanager
def tokens_bar(description: str) -> Iterator[Callable[[int, int | None, "ReadingState"], None]]:
    """Show the progress of a reading, from the first update on, which is the first to know how many tokens there are.

    Args:
        description: what is being done.

    Yields:
        A function of (tokens done, tokens in all, state).
    """
    with contextlib.ExitStack() as stack:
        move: Callable[..., None] | None = None

        def update(done: int, total: int | None, state: "ReadingState") -> None:
            nonlocal move
            if move is None:
                move = stack.enter_context(follow(description, "tokens", total))
            move(done, total, f"state {decimal(state.num_bytes)}")

        yield update


@contextlib.contextmanager
def questions_bar(num_questions: int | None, description: str) -> Iterator[Callable[[float], None]]:
    """Show the progress of questions.

    Args:
        num_questions: all questions, those of earlier runs included; None where the number is not known.
        description: what is being done.

    Yields:
        A function of the questions done.
    """
    with follow(description, "questions", num_questions) as move:
        yield lambda done: move(done, num_questions, "")


@contextlib.contextmanager
def training_bar(num_steps: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the progress of a training.

    Args:
        num_steps: steps to be done, all runs together.

    Yields:
        A function of a step's row of the log.
    """
    with follow("training", "steps", num_steps, shows_rate=False) as move:

        def update(row: Mapping[str, Any]) -> None:
            keys = "" if row["key_accuracy"] is None else f"keys {row['key_accuracy']:.2f}, "
            numbers = f"loss {row['loss']:.3f}, {keys}{row['tokens_per_second']:,.0f} tokens/s"
            move(row["step"] + 1, num_steps, f"{numbers}, stage {row['stage']}")

        yield update


@contextlib.contextmanager
def study_bar(seconds: float | None, steps: int | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the progress of a study.

    Args:
        seconds: time of training, all runs together; None where steps alone count.
        steps: steps to be done, all runs together; None where time alone counts.

    Yields:
        A function of a step's row of the log.
    """
    with follow("studying", "%", 100.0, shows_rate=False) as move:
        held_out = "-"

        def update(row: Mapping[str, Any]) -> None:
            nonlocal held_out
            done = row["step"] + 1
            shares = [row["seconds"] / seconds] if seconds else []
            shares += [done / steps] if steps else []
            if row["held_out_loss"] is not None:
                held_out = f"{row['held_out_loss']:.3f}"
            text = f"step {done:,}, loss {row['loss']:.3f}, held out {held_out}"
            move(100 * min(1.0, max(shares, default=0.0)), 100.0, text)

        yield update


@contextlib.contextmanager
def parts_bar(description: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of work in several parts, one after the other.

    Args:
        description: what is being done.

    Yields:
        A function of (name of the part, how much of it is done, how much there is).
    """
    with contextlib.ExitStack() as stack:
        move: Callable[..., None] | None = None
        current: str | None = None

        def update(part: str, done: int, total: int) -> None:
            nonlocal move, current
            if part != current or move is None:
                stack.close()
                current, move = part, stack.enter_context(follow(f"{description}: {part}", "steps", total))
            move(done, total, "")

        yield update


@contextlib.contextmanager
def runs_bar(table: Callable[[], Table]) -> Iterator[None]:
    """Show a table of runs on a terminal, as it changes; else a line of its caption every half minute.

    Args:
        table: gives it as it is now.
    """
    console = screen()
    if LEVEL.is_quiet:
        yield
    elif console.is_terminal and not console.is_dumb_terminal:
        with Live(get_renderable=table, console=console, refresh_per_second=0.5):
            yield
    else:
        ended = threading.Event()

        def print_lines() -> None:
            while not ended.wait(SECONDS_BETWEEN_LINES):
                shown = table()
                screen(soft_wrap=True).print(f"{shown.title}: {shown.caption}", highlight=False, markup=False)

        thread = threading.Thread(target=print_lines, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
