"""The subcommand `fam data make`: questions of benchmarks that people quote, for `fam evaluate answers`."""

import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import warnings_said
from transformerfam.cli.options import JsonOption, ModelOption
from transformerfam.cli.output import print_json, say
from transformerfam.cli.progress import questions_bar
from transformerfam.errors import TransformerFamError
from transformerfam.fields import LARGEST_INTEGER, whole_numbers
from transformerfam.files.writing import replacing, require_writable
from transformerfam.processes import INTERRUPTED
from transformerfam.sources.source import CACHE_VARIABLE
from transformerfam.tasks.babilong import babilong_tasks
from transformerfam.tasks.longbench import WITHOUT_SCORER, longbench_files, longbench_questions, longbench_tasks
from transformerfam.tasks.made_questions import Lengths, MadeQuestion, MadeTask, make_questions
from transformerfam.tasks.published import PUBLISHED, published_questions
from transformerfam.tasks.ruler import ruler_tasks
from transformerfam.tasks.ruler.parts import Parts
from transformerfam.tasks.text import encode
from transformerfam.tasks.unknown_words import say_unknown
from transformerfam.weights.models import load_tokenizer

MADE = ("ruler", "babilong")
BENCHMARKS = (*MADE, "longbench", *PUBLISHED)
NUM_ITEMS = 50
Part = tuple[str, int | None, Iterator[MadeQuestion]]
"""What a progress line calls some questions, their number if it is known, and these."""


def make_command(
    benchmark: Annotated[str, typer.Argument(help=f"Of {', '.join(BENCHMARKS)}.")],
    output: Annotated[Path, typer.Option("--output", help="JSON lines, for fam evaluate answers; a new file.")],
    task: Annotated[str | None, typer.Option("--task", help="NAME or NAME,NAME,...; all if not given.")] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="N or N,N,...: of text, question and room for the answer.")
    ] = None,
    model: ModelOption = "tiny",
    num_items: Annotated[
        int | None,
        typer.Option(
            "--num-items", min=1, max=LARGEST_INTEGER, help=f"Questions a task and length; {NUM_ITEMS}, or all on disk."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Of all that is drawn.")] = 0,
    given: Annotated[
        Path | None, typer.Option("--from", help="The folder of published files, for benchmarks that are not made.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help=f"Where data is kept; {CACHE_VARIABLE}, else the user's cache.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write RULER's or BABILong's questions in texts of any length, or those of others from their published files.

    Lengths are in tokens of --model, of which the tokenizer alone is loaded.
    """
    _named([benchmark], BENCHMARKS, "benchmark")
    _require_new(output)
    names = list(dict.fromkeys(part.strip() for part in task.split(","))) if task is not None else None
    if benchmark not in MADE:
        parts = _on_disk(benchmark, names, tokens, given, num_items)
    else:
        if given is not None:
            raise TransformerFamError(f"--from has published files, and {benchmark} is made; leave it out")
        tasks = ruler_tasks(Parts(folder)) if benchmark == "ruler" else babilong_tasks()
        _named(names or (), tasks, "task")
        chosen = [tasks[name] for name in names or tasks]
        parts = _of_made(benchmark, chosen, tokens, model, num_items or NUM_ITEMS, seed)
    written: dict[str, int] = {}
    try:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8") as file:
            for name, total, questions in parts:
                number = 0
                with questions_bar(total, name) as update:
                    for number, question in enumerate(questions, start=1):
                        file.write(question.line())
                        update(number)
                written[name] = number
                say(f"{name}: {number:,} written")
    except KeyboardInterrupt as interrupt:
        say(f"interrupted; {output} was not written", always=True)
        raise typer.Exit(INTERRUPTED) from interrupt
    if as_json:
        print_json({"file": output, "questions": written})
    else:
        typer.echo(output)


def _require_new(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise TransformerFamError(f"{output} is there already, and no file is replaced; choose another name")
    require_writable(output)


def _named(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a name that there is none of; the nearest is in the message."""
    known = list(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"take one of {', '.join(known)}"
            raise TransformerFamError(f"there is no {what} {name!r}; {hint}")


def _on_disk(
    benchmark: str, names: list[str] | None, tokens: str | None, given: Path | None, num_items: int | None
) -> list[Part]:
    """Return the questions of published files."""
    if tokens is not None or given is None:
        raise TransformerFamError(
            f"{benchmark} has texts with lengths of their own, from files on disk; leave --tokens out, and give --from "
            "FOLDER"
        )
    if benchmark in PUBLISHED:
        if names is not None:
            raise TransformerFamError(f"--task names the tasks of a benchmark, and {benchmark} is one; leave it out")
        found = {benchmark: published_questions(benchmark, given)}
    else:
        _named(names or (), (*longbench_tasks(), *WITHOUT_SCORER), "task")
        files = longbench_files(given, names)
        found = {f"longbench {name}": longbench_questions(name, path) for name, path in files.items()}
    return [(name, num_items, itertools.islice(questions, num_items)) for name, questions in found.items()]


def _of_made(
    benchmark: str, tasks: list[MadeTask], tokens: str | None, model: str, num_items: int, seed: int
) -> list[Part]:
    """Return what makes the questions, each begun: a length that does not fit is refused before hours of work."""
    if tokens is None:
        raise TransformerFamError(f"{benchmark} is made in lengths, required is --tokens, for example 4096,32768")
    numbers = list(dict.fromkeys(whole_numbers(tokens, "--tokens")))
    tokenizer = load_tokenizer(model)
    lengths, parts = Lengths(tokenizer), list[Part]()
    with warnings_said():
        for task, number in itertools.product(tasks, numbers):
            questions = make_questions(task, lengths, number, num_items, seed)
            first = next(questions)
            say_unknown(tokenizer, encode(tokenizer, first.text), f"the text of {task.name}")
            name = f"{benchmark} {task.name}, {number:,} tokens"
            parts.append((name, num_items, itertools.chain((first,), questions)))
    return parts
