"""The subcommand `fam evaluate next-token`."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import load, named_with, systems_by_model
from transformerfam.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, SetOption, SystemOption
from transformerfam.cli.output import print_tables
from transformerfam.cli.progress import tokens_bar
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.reports.next_token import next_token_table
from transformerfam.reports.rows import RowFile, require_same_weights
from transformerfam.tasks.controls import control_of
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.provenance import weights_of
from transformerfam.tasks.text import STANDARD_INPUT
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.models import name_in_rows


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
    as_json: JsonOption = False,
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
    print_tables([next_token_table(shown)], as_json, rows=output, measured=shown)
