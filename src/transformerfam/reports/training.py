"""How trainings went, from their logs: a table of runs, and the loss by step as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.files.reading import parse_json, read_whole, required_form
from transformerfam.reports.figure import GREYS, LINES, MARKERS, new_figure, save_figure

LOG_FILE = "log.jsonl"
LOSS, VALIDATION_LOSS, SCORE = "loss", "validation_loss", "validation_score"
SMOOTHED = 50
"""A point of the curve is the mean over so many parts of the run, or over one step where there are fewer."""

Log = list[Mapping[str, Any]]


def read_log(path: Path) -> Log:
    """Return the steps of a training's log, without one that is being written.

    Args:
        path: the log, or the folder of a run.

    Raises:
        CorruptFileError: a line is no step.
        TransformerFamError: there is no log.
    """
    place = path / LOG_FILE if path.is_dir() else path
    try:
        content = read_whole(place)
    except OSError as error:
        raise TransformerFamError(
            f"cannot read {str(place)!r} ({error.strerror}); required is the folder of a run, or its {LOG_FILE}"
        ) from error
    steps: Log = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        with required_form(f"line {number} of {place} is no step of a training", f"give the {LOG_FILE} of a run"):
            step = dict(parse_json(line))
            steps.append(step | {"step": int(step["step"]), LOSS: float(step[LOSS])})
    if not steps:
        raise CorruptFileError(f"{place} holds no step yet; train on with fam train --resume")
    return steps


def log_name(path: Path) -> str:
    """Return what a run is called: its folder."""
    return path.name if path.is_dir() else path.absolute().parent.name


def training_table(logs: Mapping[str, Log]) -> Table:
    """Return a line for every run: steps, tokens, hours, first and last loss, and the best of held-out texts.

    Args:
        logs: by the name of the run.
    """
    steps = [step for log in logs.values() for step in log]
    held_out = [name for name in (VALIDATION_LOSS, SCORE) if any(step.get(name) is not None for step in steps)]
    table = Table(title="Trainings", caption="last loss: the mean of the last tenth of the steps")
    table.add_column("run")
    for name in ("steps", "tokens", "hours", "first loss", "last loss"):
        table.add_column(name, justify="right")
    for name in held_out:
        table.add_column("held-out loss" if name == VALIDATION_LOSS else "held-out score", justify="right")
    for run, log in logs.items():
        last = [step[LOSS] for step in log[-max(1, len(log) // 10) :]]
        tokens, seconds = log[-1].get("tokens"), log[-1].get("seconds")
        cells = [f"{log[-1]['step'] + 1:,}", "-" if tokens is None else f"{tokens:,}"]
        cells += ["-" if seconds is None else f"{seconds / 3600:.2f}", f"{log[0][LOSS]:.3f}", f"{mean(last):.3f}"]
        for name in held_out:
            values = [step[name] for step in log if step.get(name) is not None]
            best = (min if name == VALIDATION_LOSS else max)(values, default=None)
            cells.append("-" if best is None else f"{best:.3f}")
        table.add_row(escape(run), *cells)
    return table


def plot_training(logs: Mapping[str, Log], path: str | Path) -> None:
    """Draw the loss of trainings by step, and that of held-out texts as points where there is one.

    Args:
        logs: by the name of the run.
        path: file to write; its suffix says how: .svg, .png or .pdf.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TransformerFamError: the suffix is another one, or the file is no figure of this package.
    """
    with new_figure(path, (6.4, 3.6)) as (figure, (axes,)):
        for index, (run, log) in enumerate(logs.items()):
            style = {"color": GREYS[index % len(GREYS)], "linestyle": LINES[index % len(LINES)]}
            steps, losses = smoothed(log)
            axes.plot(steps, losses, label=run, linewidth=1.3, **style)
            held_out = [(s["step"] + 1, s[VALIDATION_LOSS]) for s in log if s.get(VALIDATION_LOSS) is not None]
            if held_out:
                marker = MARKERS[index % len(MARKERS)]
                options = {"marker": marker, "markersize": 4.5, "markerfacecolor": "white", "linewidth": 0.7}
                axes.plot(*zip(*held_out, strict=True), label=f"{run}, held-out texts", **options, **style)
        axes.set_xlabel("steps")
        axes.set_ylabel("loss")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        save_figure(figure, path)


def smoothed(log: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return the middle step and the mean loss of each of `SMOOTHED` parts of a log."""
    size = max(1, len(log) // SMOOTHED)
    parts = [log[start : start + size] for start in range(0, len(log), size)]
    return [mean(s["step"] + 1 for s in part) for part in parts], [mean(s[LOSS] for s in part) for part in parts]
