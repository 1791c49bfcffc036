"""The subcommands of `fam evaluate`: passkey retrieval, and the prediction of every token of a text."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from transformerfam.cli.evaluate_answers import evaluate_answers_command
from transformerfam.cli.loading import load, named_with, systems_by_model
from transformerfam.cli.options import DeviceOption, DtypeOption, ModelOption, SetOption, SystemOption
from transformerfam.cli.output import say
from transformerfam.cli.progress import tokens_bar
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER, whole_numbers
from transformerfam.processes import INTERRUPTED, process_share
from transformerfam.reports.next_token import next_token_table
from transformerfam.reports.passkey import passkey_table
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows, require_same_weights
from transformerfam.reports.telling import NUM_DIGITS
from transformerfam.tasks.controls import control_of
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey import PAPER
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation, finished_questions
from transformerfam.tasks.passkey_questions import MAX_MENTIONS
from transformerfam.tasks.provenance import memory_notes, weights_of
from transformerfam.tasks.text import STANDARD_INPUT
from transformerfam.tasks.wordings import Wording
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.models import name_in_rows

evaluate_app = typer.Typer(no_args_is_help=True)
evaluate_app.command("answers")(evaluate_answers_command)

RowsOption = Annotated[Path, typer.Option("--output", help="JSON lines; finished questions in it are not asked again.")]
FillerTokensOption = Annotated[str, typer.Option("--filler-tokens", help="Tokens of filler: N or N,N,...")]
NumKeysOption = Annotated[
    int, typer.Option("--num-keys", min=1, max=LARGEST_INTEGER, help="Keys, each asked at every length.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Seed of keys and jitter.")]
FillerOption = Annotated[
    str, typer.Option("--filler", help="sentences (the paper's), persuasion, northanger_abbey, or a UTF-8 file.")
]
JitterOption = Annotated[bool, typer.Option(help="Add up to a block of filler to each question.")]
BatchOption = Annotated[
    int, typer.Option("--batch-size", min=1, max=LARGEST_INTEGER, help="Keys that are read side by side.")
]
PrefixOption = Annotated[
    str,
    typer.Option(
        "--prefix-tokens",
        help="Tokens of filler in front of the key; uniform: keys anywhere in texts of --filler-tokens, beyond the "
        "window of the question.",
    ),
]
OverwrittenOption = Annotated[
    bool, typer.Option("--overwritten", help="Tell another key in front of those: the last must come back.")
]
DigitsOption = Annotated[int, typer.Option("--digits", min=1, max=9, help="Digits of a key.")]
MentionsOption = Annotated[int, typer.Option("--mentions", min=1, max=MAX_MENTIONS, help="Times that a key is told.")]
WordingOption = Annotated[
    Path | None, typer.Option("--wording", help="TOML file with intro, question and answer, which hold {key}.")
]


@evaluate_app.command("passkey")
def evaluate_passkey_command(
    output: RowsOption,
    filler_tokens: FillerTokensOption,
    model: ModelOption = "tiny",
    num_keys: NumKeysOption = 20,
    seed: SeedOption = 0,
    system: SystemOption = None,
    filler: FillerOption = "sentences",
    jitter: JitterOption = True,
    batch_size: BatchOption = 10,
    prefix_tokens: PrefixOption = "0",
    overwritten: OverwrittenOption = False,
    digits: DigitsOption = NUM_DIGITS,
    mentions: MentionsOption = 1,
    wording: WordingOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overrides: SetOption = None,
) -> None:
    """Hide keys in filler, read once per key, and ask at every length; a killed run goes on where it was."""
    model_name = named_with(model, overrides, dtype)
    evaluation_of = partial(
        PasskeyEvaluation,
        filler_lengths=whole_numbers(filler_tokens, "--filler-tokens"),
        num_keys=num_keys,
        seed=seed,
        filler=filler,
        jitter=jitter,
        batch_size=batch_size,
        prefix_tokens=_prefix_length(prefix_tokens),
        overwritten=overwritten,
        num_digits=digits,
        num_mentions=mentions,
        wording=PAPER if wording is None else Wording.load(wording),
        checkpoint=output,
        model_name=model_name,
        process=process_share(),
    )
    with RowFile(output) as rows:
        for loaded, asked in systems_by_model(system).items():
            loaded_model, tokenizer = load(model, loaded, parse_overrides(overrides), device, dtype)
            systems = [name_in_rows(name, loaded_model) for name in asked]
            require_same_weights(rows.rows, model_name, systems, **weights_of(loaded_model))
            longest = memory_notes(model, loaded).get("max_training_filler_tokens")
            with tokens_bar(f"passkey, {', '.join(systems)}") as update:
                evaluation = evaluation_of(systems=systems, max_training_filler_tokens=longest, progress=update)
                _append_answers(rows, evaluation, loaded_model, tokenizer)
        if process_share()[0] == 0:  # of several the first shows the rows of all that are done
            with fields_of_rows():
                table = passkey_table(read_rows([output]))
            _print_table(table)


def _prefix_length(text: str) -> int | Literal["uniform"]:
    if text == "uniform":
        return "uniform"
    numbers = whole_numbers(text, "--prefix-tokens")
    if len(numbers) != 1:
        raise TransformerFamError(f"--prefix-tokens is {text!r}, required is one number, or uniform")
    return numbers[0]


def _append_answers(rows: RowFile, evaluation: PasskeyEvaluation, model: Any, tokenizer: Any) -> None:
    """Ask what the rows do not answer yet; Ctrl-C ends the command, and they keep what was answered."""
    with fields_of_rows():
        evaluation.finished = finished_questions(rows.rows, evaluation)
    try:
        for row in evaluation.rows(model, tokenizer):
            rows.append(row)
    except KeyboardInterrupt as interrupt:
        say(f"interrupted; {rows.path} keeps {len(rows.rows)} rows; run the same command again to go on")
        raise typer.Exit(INTERRUPTED) from interrupt


@evaluate_app.command("next-token")
def evaluate_next_token_command(
    file: Annotated[str, typer.Argument(help="UTF-8 text, a folder, persuasion, northanger_abbey, or - (stdin).")],
    model: ModelOption = "tiny",
    system: SystemOption = None,
    num_tokens: Annotated[
        int | None, typer.Option("--num-tokens", min=2, max=LARGEST_INTEGER, help="Tokens to read; all if not given.")
    ] = None,
    segment_tokens: Annotated[
        int | None, typer.Option("--segment-tokens", min=1, max=LARGEST_INTEGER, help="Also a row for every N tokens.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="JSON lines; rows are appended.")] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overrides: SetOption = None,
) -> None:
    """Measure loss and accuracy of predicting every token of a text."""
    if file == STANDARD_INPUT and "," in (system or ""):
        raise TransformerFamError("standard input can be read once; give one system, or a file")
    shown, by_model = [], systems_by_model(system)
    for name in [name for systems in by_model.values() for name in systems]:
        if control_of(name) is not None:
            raise TransformerFamError(f"system {name!r} belongs to the passkey task; take fam or bswa")
    with RowFile(output) if output is not None else contextlib.nullcontext() as rows:
        for loaded, systems in by_model.items():
            loaded_model, tokenizer = load(model, loaded, parse_overrides(overrides), device, dtype)
            named = name_in_rows(systems[0], loaded_model)
            before = [] if rows is None else rows.rows
            require_same_weights(before, named_with(model, overrides, dtype), [named], **weights_of(loaded_model))
            with tokens_bar(f"next token, {loaded}") as update:
                measured = evaluate_next_token(
                    loaded_model,
                    tokenizer,
                    file,
                    num_tokens=num_tokens,
                    segment_tokens=segment_tokens,
                    system=named,
                    model_name=named_with(model, overrides, dtype),
                    progress=update,
                )
                for row in measured:
                    shown.append(row)
                    if rows is not None:
                        rows.append(row)
    _print_table(next_token_table(shown))


def _print_table(table: Table | None) -> None:
    if table is not None:
        Console().print(table)
