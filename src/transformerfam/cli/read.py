"""The subcommand `fam read`."""

import shlex
import warnings
from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import load_reader
from transformerfam.cli.options import (
    OR_OVERWRITE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OneSystemOption,
    OverwriteOption,
    device_argument,
    system_arguments,
)
from transformerfam.cli.output import say, tell
from transformerfam.cli.progress import tokens_bar
from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.files.tensors import require_target
from transformerfam.processes import INTERRUPTED, uninterrupted
from transformerfam.tasks.reading import count_tokens, read_text_stream, save_somewhere
from transformerfam.tasks.text import STANDARD_INPUT, is_read_once, list_files, stream_text


def read_command(
    file: Annotated[str, typer.Argument(help="UTF-8 text, a folder of them, or - for standard input.")],
    save: Annotated[Path, typer.Option("--save", help="Where the state goes.")],
    model: ModelOption = "tiny",
    system: OneSystemOption = "fam",
    state: Annotated[Path | None, typer.Option("--state", help="Continue from this state.")] = None,
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
    as_json: JsonOption = False,
) -> None:
    """Read a text of any length and save the state; if interrupted, save it and print the command that resumes."""
    is_resumed = state is not None and state.resolve() == save.resolve()
    replaces = overwrite or is_resumed
    require_target(save, "state", replaces, OR_OVERWRITE)
    if file != STANDARD_INPUT:
        list_files(file)  # before the model is loaded
    loaded_model, tokenizer = load_reader(model, system, device, dtype)
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
            named = ["--model", model, *system_arguments(system)]
            again = shlex.join(["fam", "read", file, *named, "--state", str(kept), "--save", str(kept)])
            again += device_argument(device) + (f" --dtype {dtype}" if dtype else "")
            again += f"{' --allow-unknown' if allow_unknown else ''} --skip-tokens {num_done}"
            text = f"after {num_done:,} tokens, which are kept in {kept}; resume with: {again}"
            if isinstance(error, KeyboardInterrupt):
                say(f"interrupted {text}", always=True)
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(INTERRUPTED) from error
        raise TransformerFamError(f"{error or type(error).__name__}; the reading ended {text}") from error
    with uninterrupted(and_forgotten=True):
        kept, refusal = save_somewhere(reading, save, replaces)
        for warning in noted:
            say(str(warning.message), always=True)
        facts = {"state": kept, "num_tokens_read": reading.num_tokens_read, "state_bytes": reading.num_bytes}
        message = f"read {reading.num_tokens_read:,} tokens; state of {reading.num_bytes:,} bytes in {kept}"
        tell({**facts, "file_bytes": kept.stat().st_size, "model": model, "system": system}, message, as_json)
    if refusal is not None:
        raise refusal
