"""The progress of a training run on a terminal: steps, loss, key accuracy, tokens per second, time left."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from transformerfam.training.trainer import Trainer

SHOWN_STEPS = 20  # loss and accuracy are means over so many steps


@contextlib.contextmanager
def training_bar(
    trainer: Trainer, console: Console | None = None
) -> Iterator[Callable[[Trainer, dict[str, Any]], None]]:
    """Show a bar and yield the function that `Trainer.run` calls after every step.

    Args:
        trainer: the run; a resumed one begins where it stands.
        console: where to draw; None is the terminal.
    """
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    recent: deque[dict[str, Any]] = deque(maxlen=SHOWN_STEPS)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=trainer.recipe.schedule.steps, completed=trainer.step, text="")

        def update(trainer: Trainer, row: dict[str, Any]) -> None:
            recent.append(row)
            loss = sum(r["loss"] for r in recent) / len(recent)
            right = [r["key_accuracy"] for r in recent if r["key_accuracy"] is not None]
            keys = f", keys {sum(right) / len(right):.0%}" if right else ""
            text = f"stage {row['stage']}, loss {loss:.3f}{keys}, {row['tokens_per_second']:.0f} tokens/s"
            progress.update(task, completed=trainer.step, text=text)

        yield update
