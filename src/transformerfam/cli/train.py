"""The subcommand `fam train`."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from transformerfam.cli.options import DeviceOption, OverwriteOption, SetOption, device_argument
from transformerfam.cli.output import say
from transformerfam.cli.process import set_up_training
from transformerfam.cli.progress import training_bar
from transformerfam.errors import TransformerFamError
from transformerfam.processes import INTERRUPTED
from transformerfam.training.recipe.describe import recipe_text
from transformerfam.training.recipe.toml import load_recipe
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
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            "--report-to",
            help="Tracker of transformers' Trainer that gets every number of the log, as tensorboard, mlflow or wandb; "
            "may be given more than once.",
        ),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Train a memory by a recipe."""
    if resume and overwrite:
        raise TransformerFamError("--resume continues a run and --overwrite starts over; give one of them")
    loaded = load_recipe(recipe, overrides or ())
    if print_recipe:
        typer.echo(recipe_text(loaded), nl=False)
        return
    callbacks = _trackers(report_to) if report_to else []
    folder = output or Path("runs") / recipe.stem
    set_up_training(loaded.schedule.threads)
    trainer = Trainer(loaded, folder, resume=resume, device=find_device(device), overwrite=overwrite)
    with _following(trainer, callbacks) as report, training_bar(loaded.schedule.steps) as update:

        def on_step(trainer: Trainer, row: dict[str, Any]) -> bool:
            update(row)
            return report(trainer, row)

        result = trainer.run(on_step)
    if result.is_complete:
        say(result.message)
    else:
        place = [] if output is None else ["--output", str(folder)]
        changes = [part for change in overrides or () for part in ("--set", change)]
        more = shlex.join([str(recipe), "--resume", *place, *changes])
        say(result.message.replace("RECIPE --resume", more) + device_argument(device))
        raise typer.Exit(INTERRUPTED)


def _trackers(names: Sequence[str]) -> list[Any]:
    """Return trackers; what they need of transformers is imported where there are some."""
    from transformerfam.tools.callbacks import trackers

    return list(trackers(names))


def _following(
    trainer: Trainer, callbacks: Sequence[Any]
) -> AbstractContextManager[Callable[[Trainer, dict[str, Any]], bool]]:
    """Return what passes every step on to trackers."""
    if not callbacks:
        return nullcontext(lambda trainer, row: False)
    from transformerfam.tools.callbacks import TrainerCallbacks

    return TrainerCallbacks(trainer, callbacks)
