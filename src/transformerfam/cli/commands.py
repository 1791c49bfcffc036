"""The command `fam`: each subcommand parses, calls one function, and prints."""

import contextlib
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from transformerfam.cli.compare import compare_command
from transformerfam.cli.demo import draw_seed, prepare_demo, run_demo
from transformerfam.cli.output import say
from transformerfam.cli.overview import Commands, main
from transformerfam.cli.plan import plan_command
from transformerfam.cli.progress import tokens_bar, training_bar
from transformerfam.cli.report import report_app
from transformerfam.config import FAM_DTYPES, UPDATE_PRESETS, FamConfig
from transformerfam.decoder.memory import hold_weights_in
from transformerfam.errors import TransformerFamError
from transformerfam.fam.prompt import set_prompt
from transformerfam.fam.state import FamState
from transformerfam.fields import LARGEST_INTEGER, whole_numbers
from transformerfam.files import require_target
from transformerfam.processes import INTERRUPTED, own_device, process_share, uninterrupted
from transformerfam.reports.next_token import next_token_table
from transformerfam.reports.passkey import passkey_table
from transformerfam.reports.rows import RowFile, fields_of_rows, read_rows, require_same_weights
from transformerfam.reports.telling import NUM_DIGITS
from transformerfam.rivals.presets import NUM_SINK_TOKENS
from transformerfam.tasks.controls import CONTROLS, control_of
from transformerfam.tasks.next_token import evaluate_next_token
from transformerfam.tasks.passkey import PAPER
from transformerfam.tasks.passkey_evaluation import MAX_MENTIONS, PasskeyEvaluation, finished_questions
from transformerfam.tasks.provenance import memory_notes, weights_of
from transformerfam.tasks.reading import count_tokens, generate_text, read_text_stream, save_somewhere
from transformerfam.tasks.text import (
    STANDARD_INPUT,
    encode_rest,
    encode_start,
    is_read_once,
    list_files,
    say_unknown,
    stream_text,
)
from transformerfam.tasks.wordings import Wording
from transformerfam.training.averaging import average_memories
from transformerfam.training.recipe.toml import load_recipe, parse_overrides
from transformerfam.training.trainer import Trainer
from transformerfam.weights.adapter import require_own_folder
from transformerfam.weights.models import GATED, find_device, load_model, name_in_rows, save_model

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)
app.callback()(main)
evaluate_app = typer.Typer(no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate", help="Measure a model; rows go to a JSON lines file.")
app.add_typer(report_app, name="report", help="Tables and figures of result rows, and pictures of attention.")
app.command("plan")(plan_command)
app.command("compare")(compare_command)

PROMPT_TEXT = (
    ".\nHere is what has been read so far: who is there, what they said and did, where and when it happened, which "
    "names and numbers were given, what was promised, what was asked and what is still open. Who reads on will need "
    "to know all of this, and nothing of it stands anywhere else."
)
"""What the prompt of a gated memory begins as; see docs/update.md, "What it costs a model that was not trained"."""

ModelOption = Annotated[str, typer.Option("--model", help="tiny, smollm2, or a folder.")]
SystemOption = Annotated[
    str | None,
    typer.Option(
        "--system",
        help="fam (the model's own memory, in rows fam_gated where it is gated), bswa, fam_untrained, "
        f"{', '.join(f'fam{ending}' for ending in CONTROLS)}; several with commas. By default the model's own memory.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help=f"Type of the weights, of {', '.join(FAM_DTYPES)}; as they are if not given."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 or another of torch.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Take the place of what this package wrote there.")]
OR_OVERWRITE = "add --overwrite to replace it, or "
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key=value; may be given more than once.")]


@evaluate_app.command("passkey")
def evaluate_passkey_command(
    output: Annotated[Path, typer.Option("--output", help="JSON lines; finished questions in it are not asked again.")],
    filler_tokens: Annotated[str, typer.Option("--filler-tokens", help="Tokens of filler: N or N,N,...")],
    model: ModelOption = "tiny",
    num_keys: Annotated[
        int, typer.Option("--num-keys", min=1, max=LARGEST_INTEGER, help="Keys, each asked at every length.")
    ] = 20,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Seed of keys and jitter.")] = 0,
    system: SystemOption = None,
    filler: Annotated[
        str, typer.Option("--filler", help="sentences (the paper's), persuasion, northanger_abbey, or a UTF-8 file.")
    ] = "sentences",
    jitter: Annotated[bool, typer.Option(help="Add up to a block of filler to each question.")] = True,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=LARGEST_INTEGER, help="Keys that are read side by side.")
    ] = 10,
    prefix_tokens: Annotated[
        str,
        typer.Option(
            "--prefix-tokens",
            help="Tokens of filler in front of the key; uniform: keys anywhere in texts of --filler-tokens, beyond the "
            "window of the question.",
        ),
    ] = "0",
    overwritten: Annotated[
        bool, typer.Option("--overwritten", help="Tell another key in front of those: the last must come back.")
    ] = False,
    digits: Annotated[int, typer.Option("--digits", min=1, max=9, help="Digits of a key.")] = NUM_DIGITS,
    mentions: Annotated[int, typer.Option("--mentions", min=1, max=MAX_MENTIONS, help="Times that a key is told.")] = 1,
    wording: Annotated[
        Path | None, typer.Option("--wording", help="TOML file with intro, question and answer, which hold {key}.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overrides: SetOption = None,
) -> None:
    """Hide keys in filler, read once per key, and ask at every length; a killed run goes on where it was."""
    lengths = whole_numbers(filler_tokens, "--filler-tokens")
    prefix: Any = prefix_tokens
    if prefix_tokens != "uniform":
        numbers = whole_numbers(prefix_tokens, "--prefix-tokens")
        if len(numbers) != 1:
            raise TransformerFamError(f"--prefix-tokens is {prefix_tokens!r}, required is one number, or uniform")
        prefix = numbers[0]
    words = PAPER if wording is None else Wording.load(wording)
    with RowFile(output) as rows:
        for loaded, asked in _systems_by_model(system).items():
            loaded_model, tokenizer = _load(model, loaded, parse_overrides(overrides), device, dtype)
            systems = [name_in_rows(name, loaded_model) for name in asked]
            require_same_weights(rows.rows, _named_with(model, overrides, dtype), systems, **weights_of(loaded_model))
            with tokens_bar(f"passkey, {', '.join(systems)}") as update:
                evaluation = PasskeyEvaluation(
                    filler_lengths=lengths,
                    num_keys=num_keys,
                    seed=seed,
                    systems=systems,
                    filler=filler,
                    jitter=jitter,
                    batch_size=batch_size,
                    prefix_tokens=prefix,
                    overwritten=overwritten,
                    num_digits=digits,
                    num_mentions=mentions,
                    wording=words,
                    checkpoint=output,
                    model_name=_named_with(model, overrides, dtype),
                    process=process_share(),
                    max_training_filler_tokens=memory_notes(model, loaded).get("max_training_filler_tokens"),
                    progress=update,
                )
                with fields_of_rows():
                    evaluation.finished = finished_questions(rows.rows, evaluation)
                try:
                    for row in evaluation.rows(loaded_model, tokenizer):
                        rows.append(row)
                except KeyboardInterrupt as interrupt:
                    say(f"interrupted; {output} keeps {len(rows.rows)} rows; run the same command again to go on")
                    raise typer.Exit(INTERRUPTED) from interrupt
        if process_share()[0] == 0:  # of several the first shows the rows of all that are done
            _print_table(passkey_table(read_rows([output])))


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
    shown, by_model = [], _systems_by_model(system)
    for name in [name for systems in by_model.values() for name in systems]:
        if control_of(name) is not None:
            raise TransformerFamError(f"system {name!r} belongs to the passkey task; take fam or bswa")
    with RowFile(output) if output is not None else contextlib.nullcontext() as rows:
        for loaded, systems in by_model.items():
            loaded_model, tokenizer = _load(model, loaded, parse_overrides(overrides), device, dtype)
            named = name_in_rows(systems[0], loaded_model)
            before = [] if rows is None else rows.rows
            require_same_weights(before, _named_with(model, overrides, dtype), [named], **weights_of(loaded_model))
            with tokens_bar(f"next token, {loaded}") as update:
                measured = evaluate_next_token(
                    loaded_model,
                    tokenizer,
                    file,
                    num_tokens=num_tokens,
                    segment_tokens=segment_tokens,
                    system=named,
                    model_name=_named_with(model, overrides, dtype),
                    progress=update,
                )
                for row in measured:
                    shown.append(row)
                    if rows is not None:
                        rows.append(row)
    _print_table(next_token_table(shown))


@app.command("convert")
def convert_command(
    model: Annotated[str, typer.Argument(help="smollm2, or a folder that transformers loads.")],
    output: Annotated[Path, typer.Argument(help="Folder for the converted model.")],
    preset: Annotated[
        str,
        typer.Option("--preset", help=f"Of {', '.join(UPDATE_PRESETS)}; --set changes fields of it."),
    ] = "gated",
    prompt_text: Annotated[
        str | None, typer.Option("--prompt-text", help="Text whose first tokens the memory's prompt begins as.")
    ] = None,
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
) -> None:
    """Give a model a memory that nobody trained yet, and save it with its weights; gated with 4 sink tokens."""
    require_own_folder(output, is_model=True, overwrite=overwrite, remedy=OR_OVERWRITE)
    sinks = {"num_sink_tokens": NUM_SINK_TOKENS} if FamConfig.preset(preset).has_slots else {}
    changes = FamConfig.preset(preset, **sinks | parse_overrides(overrides)).to_dict()
    converted, tokenizer = _load(model, "fam_untrained", changes)
    config = converted.fam_config
    if config.fam_length and config.fam_init == "prompt" and (preset != "paper" or prompt_text is not None):
        text = PROMPT_TEXT if prompt_text is None else prompt_text
        ids = encode_start(tokenizer, text)
        with _warnings_said():
            say_unknown(tokenizer, encode_rest(tokenizer, text), "the prompt text")
        set_prompt(converted, (ids * -(-config.fam_length // max(1, len(ids))))[: config.fam_length])
    save_model(converted, tokenizer, output)
    say(
        f"{type(converted).__name__} in {output}: {preset}, block_size {config.block_size}, fam_length "
        f"{config.fam_length}, num_memory_segments {config.num_memory_segments}, num_sink_tokens "
        f"{config.num_sink_tokens}; train its memory with fam train"
    )


@app.command("read")
def read_command(
    file: Annotated[str, typer.Argument(help="UTF-8 text, a folder of them, or - for standard input.")],
    save: Annotated[Path, typer.Option("--save", help="Where the state goes.")],
    model: ModelOption = "tiny",
    state: Annotated[Path | None, typer.Option("--state", help="Go on from this state.")] = None,
    skip_tokens: Annotated[
        int,
        typer.Option("--skip-tokens", min=0, max=LARGEST_INTEGER, help="Tokens of the text that the state has read."),
    ] = 0,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Read a text of which the model knows next to no word, too.")
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Read a text of any length and save the state; whatever ends it, what was read is saved, and how to go on said."""
    is_resumed = state is not None and state.resolve() == save.resolve()
    replaces = overwrite or is_resumed
    require_target(save, "state", replaces, OR_OVERWRITE)
    if file != STANDARD_INPUT:
        list_files(file)  # before the model is loaded
    loaded_model, tokenizer = _load(model, device=device, dtype=dtype)
    reading = loaded_model.init_state().detach() if state is None else FamState.load(state, loaded_model, batch_size=1)
    num_before = reading.num_tokens_read
    num_tokens = None if is_read_once(file) else count_tokens(file, tokenizer, state is None)
    try:
        with tokens_bar("reading") as update, warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", UserWarning)
            read_text_stream(
                loaded_model,
                tokenizer,
                stream_text(file),
                reading,
                skip_tokens=skip_tokens,
                progress=lambda n, moved: update(n, num_tokens, moved),
                allow_unknown=allow_unknown,
            )
    except BaseException as error:  # nothing that was read is lost, whatever ends the reading
        num_done = skip_tokens + reading.num_tokens_read - num_before
        if num_done == skip_tokens:
            raise
        with uninterrupted(and_forgotten=True):
            kept, _ = save_somewhere(reading, save, replaces)
            again = shlex.join(["fam", "read", file, "--model", model, "--state", str(kept), "--save", str(kept)])
            again += _device_argument(device) + (f" --dtype {dtype}" if dtype else "")
            again += " --allow-unknown" if allow_unknown else ""
            again += f" --skip-tokens {num_done}"
            text = f"after {num_done:,} tokens, which are kept in {kept}; go on with: {again}"
            if isinstance(error, KeyboardInterrupt):
                say(f"interrupted {text}")
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(INTERRUPTED) from error
        raise TransformerFamError(f"{error or type(error).__name__}; the reading ended {text}") from error
    with uninterrupted(and_forgotten=True):
        kept, refusal = save_somewhere(reading, save, replaces)
        for warning in noted:
            say(str(warning.message))
        say(f"read {reading.num_tokens_read:,} tokens; state of {reading.num_bytes:,} bytes in {kept}")
    if refusal is not None:
        raise refusal


@app.command("generate")
def generate_command(
    question: Annotated[str, typer.Argument(help="What follows the text that was read.")],
    state: Annotated[Path, typer.Option("--state", help="A state that `fam read` saved; it stays as it is.")],
    model: ModelOption = "tiny",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, max=LARGEST_INTEGER)] = 32,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Answer a question on a saved reading with the likeliest tokens."""
    loaded_model, tokenizer = _load(model, device=device, dtype=dtype)
    loaded_state = FamState.load(state, loaded_model, batch_size=1)
    with _warnings_said():
        answer = generate_text(loaded_model, tokenizer, question, loaded_state, max_new_tokens, chat)
    typer.echo(answer)


@app.command("train")
def train_command(
    recipe: Annotated[Path, typer.Argument(help="TOML file.")],
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the run; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")] = False,
    device: DeviceOption = "cpu",
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
) -> None:
    """Train a memory by a recipe."""
    if resume and overwrite:
        raise TransformerFamError("--resume continues a run and --overwrite starts over; give one of them")
    loaded = load_recipe(recipe, overrides or ())
    folder = output or Path("runs") / recipe.stem
    trainer = Trainer(loaded, folder, resume=resume, device=find_device(device), overwrite=overwrite)
    with training_bar(loaded.schedule.steps) as update:
        result = trainer.run(lambda _, row: update(row))
    if result.is_complete:
        say(result.message)
    else:
        place = [] if output is None else ["--output", str(folder)]
        changes = [part for change in overrides or () for part in ("--set", change)]
        more = shlex.join([str(recipe), "--resume", *place, *changes])
        say(result.message.replace("RECIPE --resume", more) + _device_argument(device))
        raise typer.Exit(INTERRUPTED)


@app.command("average")
def average_command(
    memories: Annotated[list[Path], typer.Argument(help="Folders of memories that were trained from one start.")],
    output: Annotated[Path, typer.Option("--output", help="Folder of the mean.")],
    overwrite: OverwriteOption = False,
    overrides: SetOption = None,
) -> None:
    """Average the weights of memories; --set changes what the mean is read with."""
    require_own_folder(output, is_model=False, overwrite=overwrite, remedy=OR_OVERWRITE)
    average_memories(memories, output, parse_overrides(overrides))
    say(f"the mean of {len(memories)} memories is in {output}")


@app.command("demo")
def demo_command(
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=LARGEST_INTEGER, help="Seed of the key; drawn if not given.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, max=LARGEST_INTEGER, help="Tokens to read; what the memory was proven for."),
    ] = None,
    model: ModelOption = "smollm2",
) -> None:
    """Hide a key on the first page of a novel, read the novel, and ask: FAM beside BSWA."""
    _hide_loading_bars()
    console = Console()
    demo = prepare_demo(model, draw_seed() if seed is None else seed, tokens)
    console.print(demo.introduction(), highlight=False)
    results = run_demo(demo, tokens_bar)
    console.print(demo.table(results))
    if not results["fam"].is_recalled:
        console.print("[red]FAM did not recall the key[/red]")
        raise typer.Exit(1)


@contextlib.contextmanager
def _warnings_said() -> Iterator[None]:
    """Print every warning of the body as a line."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in noted:
        say(str(warning.message))


def _device_argument(device: str) -> str:
    """Return what a command that goes on needs to say of the device."""
    return "" if device == "cpu" else f" --device {device}"


def _hide_loading_bars() -> None:
    transformers_logging.disable_progress_bar()


def _load(
    model: str,
    system: str = "fam",
    overrides: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> tuple[Any, Any]:
    _hide_loading_bars()
    place = find_device(own_device(device))
    if dtype not in (None, *FAM_DTYPES):
        raise TransformerFamError(f"--dtype is {dtype!r}, required is one of {', '.join(FAM_DTYPES)}; choose one")
    loaded, tokenizer = load_model(model, system, overrides)
    if dtype is not None:
        hold_weights_in(dtype, loaded)
    return loaded.to(place), tokenizer


def _systems_by_model(systems: str | None) -> dict[str, list[str]]:
    """Group the names of systems by the model that serves them: controls ask that of their system."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(part.strip() for part in (systems or "fam").split(",")):
        control = control_of(name)
        system = name if control is None else control[0]
        groups.setdefault("fam" if system == GATED else system, []).append(name)
    return groups


def _named_with(model: str, overrides: list[str] | None, dtype: str | None) -> str:
    """Return the model's name for the rows, with what was changed: rows of one name are of one system."""
    return " ".join([model, *(overrides or []), *([dtype] if dtype else [])])


def _print_table(table: Any) -> None:
    if table is not None:
        Console().print(table)
