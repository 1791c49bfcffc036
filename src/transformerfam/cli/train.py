"""The subcommand `fam train`."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from transformerfam.cli.options import DeviceOption, JsonOption, OverwriteOption, SetOption, device_argument
from transformerfam.cli.output import say, tell
from transformerfam.cli.process import set_up_training
from transformerfam.cli.progress import training_bar
from transformerfam.errors import TransformerFamError
from transformerfam.processes import INTERRUPTED
from transformerfam.training.recipe.describe import recipe_text
from transformerfam.training.recipe.toml import load_recipe
from transformerfam.training.run_folder import LOG_FILE
from transformerfam.training.trainer import Trainer
from transformerfam.weights.models import find_device


def train_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the run; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder's checkpoint.")] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print all keys of the recipe with their meaning; train nothing.")
    ] = False,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            "--log-to",
            help="Tracker that gets every number of the log: tensorboard, wandb, mlflow or another of accelerate; may "
            "be given more than once.",
        ),
    ] = None,
    report_to: Annotated[list[str] | None, typer.Option("--report-to", hidden=True)] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a memory by a recipe."""
    if resume and overwrite:
        raise TransformerFamError("--resume continues a run and --overwrite starts over; give one of them")
    loaded = load_recipe(recipe, overrides or ())
    if print_recipe:
        typer.echo(recipe_text(loaded), nl=False)
        return
    callbacks = _former_trackers(report_to) if report_to else []
    if log_to:
        _require_trackers(log_to)
    folder = output or Path("runs") / recipe.stem
    set_up_training(loaded.schedule.threads)
    trainer = Trainer(loaded, folder, resume=resume, device=find_device(device), overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        followers = [stack.enter_context(follower) for follower in _followers(trainer, log_to, callbacks)]
        update = stack.enter_context(training_bar(loaded.schedule.steps))

        def on_step(trainer: Trainer, row: dict[str, Any]) -> bool:
            update(row)
            stops = [follower(trainer, row) for follower in followers]  # each is to hear of the step
            return any(stops)

        result = trainer.run(on_step)
    if result.is_complete:
        steps = {"folder": result.folder, "steps": result.steps, "seconds": result.seconds}
        tell({**steps, "log": result.folder / LOG_FILE}, result.message, as_json)
    else:
        place = [] if output is None else ["--output", str(folder)]
        changes = [part for change in overrides or () for part in ("--set", change)]
        more = shlex.join([str(recipe), "--resume", *place, *changes])
        say(result.message.replace("RECIPE --resume", more) + device_argument(device), always=True)
        raise typer.Exit(INTERRUPTED)


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot be used; what they need is imported where there are some."""
    from transformerfam.tools.trackers import TENSORBOARD, require_trackers

    require_trackers(names)
    if TENSORBOARD in names:
        say("to see the numbers: tensorboard --logdir with the folder of the run, or of all runs")


def _former_trackers(names: Sequence[str]) -> list[Any]:
    """Return trackers of transformers' Trainer, by the option that there was before."""
    from transformerfam.tools.callbacks import trackers

    say("--report-to is --log-to now, and is removed in the next version", always=True)
    return list(trackers(names))


def _followers(trainer: Trainer, log_to: Sequence[str] | None, callbacks: Sequence[Any]) -> Iterator[Any]:
    """Yield what is entered for a training, and then called after every step."""
    if log_to:
        from transformerfam.tools.trackers import Trackers

        yield Trackers(trainer, log_to)
    if callbacks:
        from transformerfam.tools.callbacks import TrainerCallbacks

        yield TrainerCallbacks(trainer, callbacks)
