"""The subcommand `fam evaluate passkey`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from transformerfam.cli.appending import append_rows
from transformerfam.cli.loading import load, named_with, systems_by_model
from transformerfam.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, SetOption, SystemOption
from transformerfam.cli.output import print_tables
from transformerfam.cli.progress import tokens_bar
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER, whole_numbers
from transformerfam.processes import process_share
from transformerfam.reports.passkey import passkey_table
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows, require_same_weights
from transformerfam.reports.telling import NUM_DIGITS
from transformerfam.tasks.passkey import PAPER
from transformerfam.tasks.passkey_evaluation import PasskeyEvaluation, finished_questions
from transformerfam.tasks.passkey_questions import MAX_MENTIONS
from transformerfam.tasks.provenance import memory_notes, weights_of
from transformerfam.tasks.wordings import Wording
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.models import name_in_rows

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
MentionsOption = Annotated[int, typer.Option("--mentions", min=1, max=MAX_MENTIONS, help="Times that a key is given.")]
WordingOption = Annotated[
    Path | None, typer.Option("--wording", help="TOML file with intro, question and answer, which hold {key}.")
]


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
    as_json: JsonOption = False,
) -> None:
    """Hide keys in filler, read once per key, and ask at every length; a killed run continues where it was."""
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
                with fields_of_rows():
                    evaluation.finished = finished_questions(rows.rows, evaluation)
                append_rows(rows, evaluation.rows(loaded_model, tokenizer))
    if process_share()[0] == 0:  # of several the first shows the rows of all that are done
        with fields_of_rows():
            table = passkey_table(read_rows([output]))
        print_tables([table], as_json, rows=output)


def _prefix_length(text: str) -> int | Literal["uniform"]:
    if text == "uniform":
        return "uniform"
    numbers = whole_numbers(text, "--prefix-tokens")
    if len(numbers) != 1:
        raise TransformerFamError(f"--prefix-tokens is {text!r}, required is one number, or uniform")
    return numbers[0]
