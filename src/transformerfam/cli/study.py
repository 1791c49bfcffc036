"""The subcommand `fam study`."""

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import load, warnings_said
from transformerfam.cli.options import (
    OR_OVERWRITE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    device_argument,
)
from transformerfam.cli.output import say, tell
from transformerfam.cli.progress import study_bar, tokens_bar
from transformerfam.errors import ReadInterrupted, TransformerFamError
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.files.locks import hold
from transformerfam.files.tensors import require_target
from transformerfam.processes import INTERRUPTED, uninterrupted
from transformerfam.study.begin import begin_study
from transformerfam.study.checkpoint import StudyFiles, require_fresh
from transformerfam.study.lessons import LessonMaker
from transformerfam.study.options import StudyOptions
from transformerfam.study.study import Study
from transformerfam.tasks.reading import save_somewhere
from transformerfam.tasks.text import STANDARD_INPUT, is_read_once, list_files

DEFAULTS = StudyOptions()


def study_command(
    file: Annotated[str, typer.Argument(help="UTF-8 text, or a folder of them.")],
    save: Annotated[Path, typer.Option("--save", help="Where the state goes; what a study keeps is beside it.")],
    model: ModelOption = "tiny",
    minutes: Annotated[
        float, typer.Option("--minutes", min=0, max=1e6, help="Time of training, all resumed runs together.")
    ] = 20.0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=0, max=LARGEST_INTEGER, help="Steps at most, all runs together.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the study that is beside --save.")] = False,
    piece_tokens: Annotated[
        int | None,
        typer.Option("--piece-tokens", min=16, max=LARGEST_INTEGER, help="Of a piece of the text; 128, or what fits."),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option("--answer-tokens", min=1, max=LARGEST_INTEGER, help="Of what is said of it; 48, or what fits."),
    ] = None,
    pieces_per_step: Annotated[
        int, typer.Option("--pieces-per-step", min=1, max=LARGEST_INTEGER, help="Pieces that a step learns from.")
    ] = DEFAULTS.pieces_per_step,
    lr: Annotated[float, typer.Option("--lr", min=1e-6, max=10, help="Learning rate.")] = DEFAULTS.lr,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Of what is drawn.")] = DEFAULTS.seed,
    hide_memory: Annotated[
        bool, typer.Option("--hide-memory", help="Hide the memory from the teacher: for one that was never trained.")
    ] = False,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Read a text of which the model knows next to no word, too.")
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read a text, then improve the rows of the reading by questions that the model makes of it itself."""
    if resume and overwrite:
        raise TransformerFamError("--resume continues a study and --overwrite starts over; give one of them")
    _require_number("--minutes", minutes)
    _require_number("--lr", lr)
    if file == STANDARD_INPUT or is_read_once(file):
        raise TransformerFamError("a text is read again when a study is resumed; give a file, not a pipe")
    files = StudyFiles(save)
    require_target(save, "state", overwrite or resume, OR_OVERWRITE)
    if not resume:
        require_fresh(files, overwrite)
    list_files(file)  # before the model is loaded
    lock = hold(files.lock, f"the study of {save}")
    try:
        loaded, tokenizer = load(model, device=device, dtype=dtype)
        pieces, answers = LessonMaker.fitting(loaded.fam_config, tokenizer, piece_tokens, answer_tokens)
        options = StudyOptions(
            piece_tokens=pieces,
            answer_tokens=answers,
            pieces_per_step=pieces_per_step,
            lr=lr,
            seed=seed,
            hide_memory=hide_memory,
        )
        more = ["--steps", str(steps)] * (steps is not None) + ["--allow-unknown"] * allow_unknown
        more += ["--dtype", dtype] if dtype else []
        again = ["fam", "study", file, "--model", model, "--save", str(save), "--minutes", f"{minutes:g}"]
        again += [*_arguments(options), *more, "--resume"]
        resumed = f"resume with: {shlex.join(again)}{device_argument(device)}"
        try:
            with tokens_bar("reading") as update, warnings_said():
                study = begin_study(
                    loaded,
                    tokenizer,
                    file,
                    options,
                    files,
                    resume=resume,
                    allow_unknown=allow_unknown,
                    on_read=update,
                )
        except ReadInterrupted as interrupt:
            say(f"interrupted while reading; {files.reading} keeps what was read; {resumed}", always=True)
            raise typer.Exit(INTERRUPTED) from interrupt
        _run(study, files, minutes * 60, steps, resumed, first=not (resume and save.exists()), as_json=as_json)
    finally:
        lock.release()


def _run(
    study: Study, files: StudyFiles, seconds: float, steps: int | None, resumed: str, first: bool, as_json: bool
) -> None:
    """Study, save the state, and say how it went."""
    if first:  # whatever comes, there is a reading to query
        with uninterrupted():
            study.state().save(files.save)
    with study_bar(seconds, steps) as update:
        result = study.run(seconds, steps, update)
    with uninterrupted(and_forgotten=True):
        kept, refusal = save_somewhere(result.state, files.save, overwrite=True)
        size = f"state of {result.state.num_bytes:,} bytes in {kept}"
        if result.reason == "interrupted":
            say(f"{result.message}; {size}; {resumed}", always=True)
            raise typer.Exit(INTERRUPTED)
        facts = {"state": kept, "state_bytes": result.state.num_bytes, "checkpoint": files.checkpoint}
        tell({**facts, "reason": result.reason, "message": result.message}, f"{result.message}; {size}", as_json)
        say(f"{files.checkpoint} and {files.reading} are needed to continue (--resume with more --minutes) alone")
    if refusal is not None:
        raise refusal


def _arguments(options: StudyOptions) -> list[str]:
    """Return the arguments of a command whose options differ from the defaults."""
    arguments: list[str] = []
    for name, value in options.to_dict().items():
        if value != getattr(DEFAULTS, name):
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return arguments


def _require_number(option: str, value: float) -> None:
    """Refuse what is no number, which no limit of the parser does."""
    if not math.isfinite(value):
        raise TransformerFamError(f"{option} is {value}, required is a finite number")
