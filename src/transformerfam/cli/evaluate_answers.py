"""The subcommand `fam evaluate answers`: your own questions, asked of what was read."""

import importlib.resources
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.appending import append_rows
from transformerfam.cli.loading import load_system, named_with, systems_by_model, warnings_said
from transformerfam.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    SetOption,
    SystemOption,
    TemplateOption,
)
from transformerfam.cli.output import print_tables
from transformerfam.cli.progress import questions_bar
from transformerfam.config import FamConfig
from transformerfam.fields import LARGEST_INTEGER, values_to_fields, whole_numbers
from transformerfam.reports.answers import answers_tables
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows, require_same_weights
from transformerfam.tasks.answers import QuestionFile
from transformerfam.tasks.answers_evaluation import (
    BM25,
    FULL_CONTEXT,
    QUESTION_ALONE,
    TEMPLATE,
    AnswersEvaluation,
    finished_questions,
)
from transformerfam.tasks.provenance import weights_of
from transformerfam.training.recipe.toml import parse_overrides
from transformerfam.weights.models import SYSTEMS, name_in_rows, require_system

SHOWN_TEMPLATE = TEMPLATE.replace("\n", "\\n")
"""As a command line has it."""
EXAMPLE = importlib.resources.files("transformerfam") / "data" / "questions.jsonl"
OWN = (QUESTION_ALONE, BM25)
"""Systems that the model with its memory answers for."""


def _print_example(ctx: typer.Context, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        typer.echo(EXAMPLE.read_text(encoding="utf-8"), nl=False)
        raise typer.Exit


ExampleOption = Annotated[
    bool,
    typer.Option(
        "--template",
        callback=_print_example,
        is_eager=True,
        help="Print a file of questions to begin with, each of another kind, which the model tiny can read.",
    ),
]


def evaluate_answers_command(
    questions: Annotated[
        Path, typer.Argument(help="JSON lines: text or file, question, answers; id, choices and group if you like.")
    ],
    output: Annotated[Path, typer.Option("--output", help="JSON lines; finished questions in it are not asked again.")],
    model: ModelOption = "tiny",
    system: SystemOption = None,
    filler: Annotated[
        str, typer.Option("--filler", help="What texts are hidden in: sentences, a novel of the package, or a file.")
    ] = "persuasion",
    filler_tokens: Annotated[str, typer.Option("--filler-tokens", help="Tokens of filler: N or N,N,...")] = "0",
    max_new_tokens: MaxNewTokensOption = 32,
    prompt_template: TemplateOption = SHOWN_TEMPLATE,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the tokenizer's chat template.")] = False,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Read texts of words that the tokenizer does not know, too.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=LARGEST_INTEGER, help="Texts that are read side by side.")
    ] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Seed of places in filler.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overrides: SetOption = None,
    example: ExampleOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask your own questions of texts that were read, with controls; a killed run continues where it was.

    --system also takes question_alone (no text), full_context (all of it in sight) and bm25 (what is retrieved into the
    window), besides fam, bswa and controls.
    """
    model_name = named_with(model, overrides, dtype)
    evaluation_of = partial(
        AnswersEvaluation,
        questions=QuestionFile(questions),
        filler=filler,
        filler_lengths=whole_numbers(filler_tokens, "--filler-tokens"),
        max_new_tokens=max_new_tokens,
        template=prompt_template.replace("\\n", "\n"),
        chat=chat,
        allow_unknown=allow_unknown,
        batch_size=batch_size,
        seed=seed,
        model_name=model_name,
    )
    groups = _systems_by_model(system)
    for names in groups.values():
        evaluation_of(systems=names)  # refused before anything is loaded
    values_to_fields(FamConfig, parse_overrides(overrides))  # which full_context does not look at
    with RowFile(output) as rows:
        for loaded, names in groups.items():
            loaded_model, tokenizer = load_system(model, loaded, overrides, device, dtype)
            systems = [name if name in (*OWN, FULL_CONTEXT) else name_in_rows(name, loaded_model) for name in names]
            require_same_weights(rows.rows, model_name, systems, **weights_of(loaded_model))
            evaluation = evaluation_of(systems=systems)
            with questions_bar(evaluation.num_questions, f"answers, {', '.join(systems)}") as update:
                evaluation.progress = update
                with fields_of_rows():
                    evaluation.finished = finished_questions(rows.rows, evaluation, tokenizer)
                with warnings_said():
                    append_rows(rows, evaluation.rows(loaded_model, tokenizer))
    with fields_of_rows():
        tables = answers_tables(read_rows([output]))
    print_tables(tables, as_json, rows=output)


def _systems_by_model(system: str | None) -> dict[str, list[str]]:
    """Group the names of systems by what is loaded for them."""
    groups: dict[str, list[str]] = {}
    for loaded, names in systems_by_model(system).items():
        require_system(loaded, (*SYSTEMS, *OWN, FULL_CONTEXT))
        groups.setdefault("fam" if loaded in OWN else loaded, []).extend(names)
    return groups
