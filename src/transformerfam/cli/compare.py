"""The subcommand `fam compare`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from transformerfam.cli.options import JsonOption, SetOption
from transformerfam.cli.output import print_tables, say
from transformerfam.cli.process import set_up_training
from transformerfam.cli.progress import parts_bar, runs_bar
from transformerfam.comparison import Comparison, RunName, load_comparison, run_all, run_one
from transformerfam.comparison.figures import plot_comparison
from transformerfam.comparison.report import comparison_tables
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.processes import INTERRUPTED, end_with_input
from transformerfam.reports.figure import require_figure
from transformerfam.reports.markdown import require_page, write_markdown
from transformerfam.reports.rows import fields_of_rows, read_rows
from transformerfam.weights.models import find_device


def compare_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file of a comparison.")],
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the runs; runs/NAME if not given.")] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="JSON lines of finished runs; rows.jsonl in the folder if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=LARGEST_INTEGER, help="Runs at a time.")] = 2,
    figures: Annotated[list[Path] | None, typer.Option("--figure", help="Figure: .svg, .png or .pdf.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Markdown file for the tables.")] = None,
    report_only: Annotated[bool, typer.Option("--report", help="Train nothing; show what is there.")] = False,
    device: Annotated[str, typer.Option("--device", help="Where runs train and answer: cpu, cuda, cuda:1.")] = "cpu",
    run: Annotated[str | None, typer.Option("--run", help="One run alone, SYSTEM-SEED, in this process.")] = None,
    is_child: Annotated[bool, typer.Option("--ends-with-input", hidden=True)] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train and evaluate every system of a comparison alike; stop at any time, the same command resumes."""
    comparison = load_comparison(recipe, overrides or ())
    folder = output or Path("runs") / comparison.name
    if is_child:
        end_with_input()
    if run is not None:
        _run_alone(comparison, RunName.parse(run), folder, find_device(device))
        return
    rows = rows or folder / "rows.jsonl"
    for figure in figures or []:
        require_figure(figure)
    if table is not None:
        require_page(table)
    failed: list[RunName] = []
    if not report_only:
        try:
            place = find_device(device)
            failed = run_all(comparison, recipe, folder, rows, overrides or (), jobs, place, runs_bar)
        except KeyboardInterrupt as interrupt:
            say(
                f"stopped; the runs have saved what they have, and {rows} keeps those that are done; run the same "
                "command again to continue",
                always=True,
            )
            raise typer.Exit(INTERRUPTED) from interrupt
    found = read_rows([rows]) if rows.exists() else []
    with fields_of_rows():
        tables = comparison_tables(comparison, found)
    print_tables(tables, as_json, rows=rows, failed=[str(run) for run in failed])
    if table is not None:
        write_markdown(tables, table)
    for figure in figures or []:
        plot_comparison(comparison, found, figure)
    if failed:
        raise TransformerFamError(f"{len(failed)} runs failed: {', '.join(map(str, failed))}; see run.log in {folder}")


def _run_alone(comparison: Comparison, run: RunName, folder: Path, device: torch.device) -> None:
    if run not in comparison.runs:
        raise TransformerFamError(f"{run} is not a run of this comparison, required is one of its systems and seeds")
    set_up_training(comparison.recipe_of(run).schedule.threads)
    try:
        with parts_bar(str(run)) as update:
            run_one(comparison, run, folder, update, device)
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(INTERRUPTED) from interrupt
