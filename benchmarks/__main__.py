"""Run benchmarks: rows to a file, a line per row to the screen, and the report at the end."""

import importlib
import inspect
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.harness import Row
from benchmarks.models import MODELS, OTHER_MODELS
from benchmarks.placement import place
from benchmarks.report import write_report
from transformerfam.errors import TransformerFamError
from transformerfam.reports.rows import RowFile
from transformerfam.weights.models import find_device

QUESTIONS = {  # by cost: seconds first, then minutes, then an hour
    "counts": "operator calls and bytes made, equal on every machine",
    "state": "save, load and fork",
    "overhead": "FAM over BSWA",
    "efficiency": "reading over the machine's matrix products",
    "decode": "decoding after long texts, against full caches and llama.cpp",
    "training": "training on long texts, against transformers' Trainer",
    "training_dtype": "LoRA with frozen weights in bfloat16, against float32",
    "time_to_memory": "from the plain model to keys recalled",
    "serving": "`fam serve`: restarts, streams and a soak, against llama.cpp's server",
    "peers": "other memories that can be installed",
    "prefill": "reading by length, against transformers' caches",
}
DTYPES = ("float32", "bfloat16", "float16")
RESULTS = Path("benchmarks/results")
app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    questions: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(QUESTIONS)}; all if none.")] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", help=f"Of {', '.join(MODELS + OTHER_MODELS)}; the first two if none.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="JSON lines file that rows are added to.")] = RESULTS
    / "rows.jsonl",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all cores if not given.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Lengths, 1024,2048; the question's if none.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or another of torch.")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help=f"Of {', '.join(DTYPES)}.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: whether it runs, not how fast.")] = False,
) -> None:
    """Time the package against what a user would pick instead, on this machine."""
    console = Console(stderr=True)
    for name, known in ((q, QUESTIONS) for q in questions or ()):
        if name not in known:
            raise typer.BadParameter(f"there is no question {name!r}; take of {', '.join(known)}")
    for name in model or ():
        if name not in MODELS + OTHER_MODELS:
            raise typer.BadParameter(f"there is no model {name!r}; take of {', '.join(MODELS + OTHER_MODELS)}")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in questions or QUESTIONS}
    lengths = {} if tokens is None else {"lengths": _whole_numbers(tokens)}
    for name, module in modules.items():
        if lengths and "lengths" not in inspect.signature(module.run).parameters:
            raise typer.BadParameter(f"{name} has no lengths; leave --tokens out")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"there is no dtype {dtype!r}; take of {', '.join(DTYPES)}")
    try:
        place(find_device(device), getattr(torch, dtype))
    except TransformerFamError as error:
        raise typer.BadParameter(str(error)) from error
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or torch.get_num_threads())
    for question, module in modules.items():
        for name in model or getattr(module, "MODELS", MODELS):
            console.print(f"[bold]{question}[/bold] ({QUESTIONS[question]}), {name}")
            with RowFile(output) as rows:
                for row in module.run(name, quick=quick, **lengths):
                    rows.append(row)
                    console.print("  " + describe(row), highlight=False)
    for path in write_report(output):
        console.print(f"wrote {path}")


def _whole_numbers(tokens: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in tokens.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"--tokens is {tokens!r}, required are whole numbers, as in 1024,2048") from error


def describe(row: Row) -> str:
    """Return what a row says, in one line."""
    where = ("system", "num_tokens", "tokens_read", "streams", "memories")
    where += ("block_size", "fam_length", "num_memory_segments")
    fields = [f"{k} {row[k]}" for k in where if k in row]
    if "skipped" in row:
        return ", ".join([*fields, "skipped: " + row["skipped"]])
    for name in [k.removesuffix("_median") for k in row if k.endswith("_median")]:
        median, low, high = (row[f"{name}_{which}"] for which in ("median", "min", "max"))
        fields.append(f"{name} {median:.4g} ({low:.4g} to {high:.4g})")
    shown = ("num_calls", "seconds_training", "num_keys_right", "num_keys", "errors", "lost")
    shown += ("memories_per_gb_ram", "memories_per_gb_disk")
    fields += [f"{k} {v:,}" for k, v in row.items() if k.startswith("bytes_") or k in shown]
    return ", ".join(fields)


if __name__ == "__main__":
    app()
