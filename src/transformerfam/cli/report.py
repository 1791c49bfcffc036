"""The subcommands of `fam report`: tables and figures of result rows, and pictures of attention."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from transformerfam.cli.options import JsonOption, ModelOption
from transformerfam.cli.output import print_tables, tell
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER, whole_numbers
from transformerfam.files.writing import make_folder
from transformerfam.reports.answers import answers_tables, plot_answers
from transformerfam.reports.figure import require_figure
from transformerfam.reports.gap import gap_rows, gap_table
from transformerfam.reports.losses import documents_tables
from transformerfam.reports.next_token import next_token_table
from transformerfam.reports.passkey import passkey_table, plot_passkey
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows
from transformerfam.reports.training import log_name, plot_training, read_log, training_table
from transformerfam.tasks.answers_evaluation import FULL_CONTEXT
from transformerfam.tasks.passkey import PasskeyText
from transformerfam.tasks.provenance import provenance, weights_of
from transformerfam.tasks.unknown_words import require_filler, require_wording
from transformerfam.tools.attention_pictures import (
    FILM_SUFFIXES,
    memory_rows,
    plot_film,
    plot_maps,
    plot_memory,
    plot_writing,
    require_heads,
)
from transformerfam.tools.attention_record import record_attention
from transformerfam.weights.models import load_model

ROWS = "attention.jsonl"
PICTURES = ("maps.png", "film.gif", "film.png", "memory.svg", "writing.svg")
MAX_STRIP = 8
"""Blocks of the film's strip: the first ones where a key is given, else the last ones."""


def report_rows(
    rows: Annotated[list[Path], typer.Argument(help="JSON lines files of rows.")],
    figures: Annotated[
        list[Path] | None, typer.Option("--figure", help="Figure of passkeys or of answers: .svg, .png or .pdf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print tables of result rows, and draw passkeys or answers; `fam report ROWS...` is the same."""
    for figure in figures or []:
        require_figure(figure)
    loaded = read_rows(rows)
    tasks = {str(row["task"]) for row in loaded} & {"passkey", "answers"}
    if figures and len(tasks) == 2:
        raise TransformerFamError("a figure is of passkeys or of answers, and the files hold both; give those of one")
    with fields_of_rows():
        found = (
            passkey_table(loaded),
            next_token_table(loaded),
            *documents_tables(loaded),
            *answers_tables(loaded),
        )
        tables = [table for table in found if table is not None]
    if not tables:
        raise TransformerFamError(
            f"the {len(rows)} files hold {len(loaded)} rows and none is of a task that is reported; required are rows "
            "of passkey, next-token, documents or answers"
        )
    print_tables(tables, as_json, rows=rows)
    draw = plot_answers if tasks == {"answers"} else plot_passkey
    for figure in figures or []:
        with fields_of_rows():
            draw(loaded, figure)


def report_training(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or their log.jsonl.")],
    figures: Annotated[list[Path] | None, typer.Option("--figure", help="Loss by step: .svg, .png or .pdf.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print steps, tokens and losses of trainings, and draw the loss by step."""
    for figure in figures or []:
        require_figure(figure)
    names = [log_name(path) for path in runs]
    named = runs if len(set(names)) < len(runs) else names
    logs = {str(name): read_log(path) for name, path in zip(named, runs, strict=True)}
    print_tables([training_table(logs)], as_json)
    for figure in figures or []:
        plot_training(logs, figure)


def report_gap(
    rows: Annotated[list[Path], typer.Argument(help="Rows of fam evaluate documents.")],
    fam: Annotated[str, typer.Option("--fam", help="The memory: MODEL, SYSTEM as in the table, or the system alone.")],
    bswa: Annotated[str, typer.Option("--bswa", help="A window of the same bytes, trained alike.")],
    full: Annotated[str, typer.Option("--full", help="Full attention, trained alike.")] = FULL_CONTEXT,
    least_place: Annotated[
        int, typer.Option("--least-place", min=0, max=LARGEST_INTEGER, help="Leave out parts that begin before it.")
    ] = 1024,
    output: Annotated[Path | None, typer.Option("--output", help="JSON lines; rows are appended.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much of what full attention gains over a window the memory gains, by text."""
    loaded = read_rows(rows)
    with fields_of_rows():
        found = gap_rows(loaded, {"fam": fam, "bswa": bswa, "full": full}, least_place)
    if not found:
        raise TransformerFamError(
            f"no text was measured with all of {fam}, {bswa} and {full} from token {least_place:,} on; run fam "
            "evaluate documents with each on the same text"
        )
    if output is not None:
        with RowFile(output) as file:
            for row in found:
                file.append({"system": fam, "model": fam, "seed": 0, **row, **provenance()})
    print_tables([gap_table(found)], as_json, rows=found)


def report_attention(
    output: Annotated[Path, typer.Option("--output", help="Folder for pictures and rows.")],
    model: ModelOption = "tiny",
    text: Annotated[
        str, typer.Option("--text", help="sentences (the paper's), persuasion, northanger_abbey, or a UTF-8 file.")
    ] = "sentences",
    blocks: Annotated[int, typer.Option("--blocks", min=1, max=LARGEST_INTEGER, help="Blocks to read.")] = 8,
    layers: Annotated[str, typer.Option("--layers", help="Layers of the maps; the first of them is filmed.")] = "0",
    heads: Annotated[str, typer.Option("--heads", help="Heads of the maps; the first of them is filmed.")] = "0",
    block: Annotated[
        int | None,
        typer.Option("--block", min=0, max=LARGEST_INTEGER, help="Block of the maps; the last if not given."),
    ] = None,
    key: Annotated[
        int | None,
        typer.Option("--key", min=1, max=LARGEST_INTEGER, help="Give this pass key in front of the text, and mark it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw attention maps of one block, a film over blocks, the FAM's norm and change, and what gated rows wrote."""
    _require_own(output)
    chosen_layers, chosen_heads = whole_numbers(layers, "--layers"), whole_numbers(heads, "--heads")
    block = blocks - 1 if block is None else block
    if not 0 <= block < blocks:
        raise TransformerFamError(
            f"--block is {block}, the text has blocks 0 to {blocks - 1}; choose one, or more --blocks"
        )
    loaded, tokenizer = load_model(model)
    require_heads(chosen_heads, loaded.get_decoder().config.num_attention_heads)
    passkey = PasskeyText(tokenizer, text)
    num_tokens = blocks * loaded.fam_config.block_size
    require_filler(tokenizer, passkey.filler)
    ids, marks = passkey.filler.slice(0, num_tokens), {}
    if key is not None:
        require_wording(tokenizer, passkey.wording_ids, passkey.wording.name)
        ids = torch.cat([torch.tensor(passkey.intro_ids(key)), ids])[:num_tokens]
        marks = dict.fromkeys(passkey.key_places(key), "key")
    records = list(record_attention(loaded, ids, chosen_layers))
    plot_maps([record for record in records if record.block_idx == block], chosen_heads, output / "maps.png", marks)
    filmed = [record for record in records if record.layer_idx == chosen_layers[0]]
    plot_film(filmed, chosen_heads[0], output / "film.gif", marks)
    strip = filmed[:MAX_STRIP] if marks else filmed[-MAX_STRIP:]
    plot_film(strip, chosen_heads[0], output / "film.png", marks)
    plot_memory(records, output / "memory.svg")
    if loaded.fam_config.fam_update == "gated":
        plot_writing(records, output / "writing.svg")
    with RowFile(output / ROWS, replaces=True) as rows:  # its rows are those of the pictures
        for row in memory_rows(records):
            rows.append(row | {"system": "fam", "model": model, "text": text, **weights_of(loaded), **provenance()})
    names = [path.name for path in sorted(output.iterdir())]
    tell({"folder": output, "files": names}, f"{output}: {', '.join(names)}", as_json)


def _require_own(folder: Path) -> None:
    """Refuse a folder whose pictures are of something else, before they are drawn.

    Raises:
        TransformerFamError: it holds files, and no rows of attention alone; or a picture is not of this package.
    """
    make_folder(folder)
    if any(folder.iterdir()) and not (folder / ROWS).exists():
        raise TransformerFamError(f"{folder} holds files and no {ROWS} of earlier pictures; give a new or empty folder")
    if (folder / ROWS).exists():
        tasks = {str(row["task"]) for row in read_rows([folder / ROWS])} - {"attention"}
        if tasks:
            raise TransformerFamError(
                f"{folder / ROWS} holds rows of task {min(tasks)!r}, required are those of attention alone, which are "
                "replaced; give a new or empty folder"
            )
    for name in PICTURES:
        require_figure(folder / name, FILM_SUFFIXES)
    with RowFile(folder / ROWS):
        pass
