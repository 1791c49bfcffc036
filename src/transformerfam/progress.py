"""The progress bar of a reading: tokens, tokens per second, time left, bytes of state."""

import contextlib
from collections.abc import Callable, Iterator

from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from transformerfam.state import FamState


@contextlib.contextmanager
def reading_bar(
    num_tokens: int | None, description: str = "reading"
) -> Iterator[Callable[[int, int | None, FamState], None]]:
    """Show a bar on the terminal and yield the function that moves it.

    Args:
        num_tokens: tokens to be read; None where nobody knows.
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
    with Progress(*columns) as progress:
        task = progress.add_task(description, total=num_tokens, rate="", size="")

        def update(done: int, total: int | None, state: FamState) -> None:
            speed = progress.tasks[0].speed
            rate = f"{speed:,.0f} tokens/s" if speed else ""
            progress.update(task, completed=done, total=total, rate=rate, size=decimal(state.num_bytes))

        yield update
