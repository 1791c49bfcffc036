"""The subcommand `fam plan`."""

import dataclasses
from typing import Annotated, cast

import torch
import typer
from rich.table import Table

from transformerfam.cli.options import JsonOption
from transformerfam.cli.output import print_json, print_table
from transformerfam.config import FAM_DTYPES, FamConfig
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_FLOAT, LARGEST_INTEGER
from transformerfam.tools.plan import OptimizerKind, Plan, Training, find_memory, make_plan
from transformerfam.training.recipe.toml import parse_overrides

CHOICES = {"--train": ("full", "lora", "none"), "--optimizer": ("adamw", "adafactor"), "--dtype": FAM_DTYPES}


def plan_command(
    model: Annotated[
        str, typer.Argument(help="paper-1b, paper-8b, paper-24b, tiny, smollm2, a folder or a Hub name.")
    ] = "tiny",
    context: Annotated[
        int, typer.Option("--context", min=1, max=LARGEST_INTEGER, help="Tokens of a training sequence.")
    ] = 8192,
    gpus: Annotated[int, typer.Option("--gpus", min=1, max=LARGEST_INTEGER, help="Devices that share the model.")] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=LARGEST_INTEGER, help="Sequences per device and step.")
    ] = 1,
    training: Annotated[str, typer.Option("--train", help="full, lora or none.")] = "lora",
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=1, max=LARGEST_INTEGER)] = 64,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or adafactor.")] = "adamw",
    dtype: Annotated[str, typer.Option("--dtype", help=f"Of {', '.join(FAM_DTYPES)}.")] = "bfloat16",
    tokens: Annotated[
        float | None, typer.Option("--tokens", min=0, max=LARGEST_FLOAT, help="Tokens to train on, for the hours.")
    ] = None,
    tflops: Annotated[
        float,
        typer.Option("--tflops", min=1e-9, max=LARGEST_FLOAT, help="10^12 operations per second that a device does."),
    ] = 400.0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Fields of the memory, key=value; else its own, or the paper's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model will need, without its weights: parameters, bytes, operations, hours."""
    for name, value in (("--train", training), ("--optimizer", optimizer), ("--dtype", dtype)):
        if value not in CHOICES[name]:
            raise TransformerFamError(f"{name} is {value!r}, required is one of {', '.join(CHOICES[name])}")
    fam = FamConfig.from_dict(find_memory(model).to_dict() | parse_overrides(overrides))
    plan = make_plan(
        model,
        fam,
        context_tokens=context,
        gpus=gpus,
        batch_size=batch_size,
        dtype=getattr(torch, dtype),
        training=cast(Training, training),
        lora_rank=lora_rank,
        optimizer=cast(OptimizerKind, optimizer),
        training_tokens=tokens,
        tflops=tflops,
    )
    if as_json:
        print_json({**dataclasses.asdict(plan), "bytes_training": plan.bytes_training, "train": training})
    else:
        print_table(plan_table(plan, training != "none"))


def plan_table(plan: Plan, is_trained: bool) -> Table:
    """Return a plan as a table for the terminal."""
    table = Table(title=f"{plan.model}, {plan.gpus} device{'s' if plan.gpus > 1 else ''}", show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("state of one sequence, whatever was read", _size(plan.bytes_state)),
        (f"full attention's cache at {plan.context_tokens:,} tokens", _size(plan.bytes_full_cache)),
        ("reading: weights and all else", _size(plan.bytes_weights + plan.bytes_reading)),
        ("reading: operations per token", f"{plan.flops_per_token_reading:.3g}"),
    ]
    if is_trained:
        rows += [
            ("trained parameters", f"{plan.trained_parameters:,}"),
            ("training: weights", _size(plan.bytes_weights)),
            ("training: gradients", _size(plan.bytes_gradients)),
            ("training: the optimizer's averages", _size(plan.bytes_optimizer)),
            ("training: activations, logits and states", _size(plan.bytes_activations)),
            ("training: in all, per device", _size(plan.bytes_training)),
            ("training: operations per token", f"{plan.flops_per_token_training:.3g}"),
        ]
    if plan.hours is not None:
        rows.append(("training: hours", f"{plan.hours:,.1f}"))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
