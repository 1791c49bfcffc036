"""The subcommand `fam evaluate documents`."""

from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.appending import append_rows
from transformerfam.cli.loading import load_system, named_with, systems_by_model
from transformerfam.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, SetOption, SystemOption
from transformerfam.cli.output import print_tables
from transformerfam.cli.progress import tokens_bar
from transformerfam.config import FamConfig
from transformerfam.decoder.memory import memory_of
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER, values_to_fields, whole_numbers
from transformerfam.reports.losses import documents_tables
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows, require_same_weights
from transformerfam.tasks.answers_evaluation import FULL_CONTEXT
from transformerfam.tasks.controls import control_of
from transformerfam.tasks.document_losses import PLACES, DocumentLosses, finished_parts
from transformerfam.tasks.provenance import weights_of
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.models import SYSTEMS, name_in_rows, require_system


def evaluate_documents_command(
    text: Annotated[str, typer.Argument(help="UTF-8 text, a folder, persuasion, or northanger_abbey.")],
    output: Annotated[Path, typer.Option("--output", help="JSON lines; documents in it are not read again.")],
    model: ModelOption = "tiny",
    system: SystemOption = None,
    documents: Annotated[
        int, typer.Option("--documents", min=1, max=LARGEST_INTEGER, help="Stretches of the text, evenly spread.")
    ] = 50,
    document_tokens: Annotated[
        int, typer.Option("--document-tokens", min=2, max=LARGEST_INTEGER, help="Tokens of each.")
    ] = 18_432,
    places: Annotated[
        str, typer.Option("--places", help="First tokens of the parts by which losses are shown: N,N,...")
    ] = ",".join(map(str, PLACES)),
    far_tokens: Annotated[
        int, typer.Option("--far-tokens", min=1, max=LARGEST_INTEGER, help="Names last seen so long ago are far.")
    ] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            min=1,
            max=LARGEST_INTEGER,
            help="full_context sees so many tokens before each stretch of as many, for texts beyond its context.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=LARGEST_INTEGER, help="Documents that are read side by side.")
    ] = 4,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the loss by place in a document and in a block, and for names seen long before.

    --system also takes full_context (the base model with all of the document in sight), besides fam and bswa. A killed
    run continues where it was.
    """
    groups = _groups(system)
    values_to_fields(FamConfig, parse_overrides(overrides))  # which full_context does not look at
    losses = DocumentLosses(
        path=text,
        num_documents=documents,
        document_tokens=document_tokens,
        places=whole_numbers(places, "--places"),
        far_tokens=far_tokens,
        batch_size=batch_size,
        model_name=named_with(model, overrides, dtype),
    )
    with RowFile(output) as rows:
        for loaded in groups:
            loaded_model, tokenizer = load_system(model, loaded, overrides, device, dtype)
            if loaded != FULL_CONTEXT:
                losses.block_size = memory_of(loaded_model).config.block_size
            losses.system = loaded if loaded == FULL_CONTEXT else name_in_rows(loaded, loaded_model)
            losses.stride = stride if loaded == FULL_CONTEXT else None
            require_same_weights(rows.rows, losses.model_name, [losses.system], **weights_of(loaded_model))
            with fields_of_rows():
                losses.finished = finished_parts(rows.rows, losses)
            with tokens_bar(f"documents, {losses.system}") as losses.progress:
                append_rows(rows, losses.rows(loaded_model, tokenizer))
    with fields_of_rows():
        tables = documents_tables(read_rows([output]))
    print_tables(tables, as_json, rows=output)


def _groups(system: str | None) -> list[str]:
    """Return what is loaded, full attention last: it is measured at the starts of the others' blocks."""
    groups = systems_by_model(system)
    for loaded, names in groups.items():
        require_system(loaded, (*SYSTEMS, FULL_CONTEXT))
        for name in names:
            if control_of(name) is not None:
                raise TransformerFamError(f"system {name!r} is a control of questions; take another, such as bswa")
    return sorted(groups, key=lambda name: name == FULL_CONTEXT)
