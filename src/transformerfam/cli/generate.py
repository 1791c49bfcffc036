"""The subcommand `fam generate`."""

from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import load_reader, warnings_said
from transformerfam.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OneSystemOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopPOption,
)
from transformerfam.cli.output import print_json
from transformerfam.fam.state import FamState
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.tasks.reading import question_ids
from transformerfam.tasks.sampling import Sampling
from transformerfam.tasks.speaking import speak, trimmed


def generate_command(
    question: Annotated[str, typer.Argument(help="What follows the text that was read.")],
    state: Annotated[Path, typer.Option("--state", help="A state that `fam read` saved; it stays as it is.")],
    model: ModelOption = "tiny",
    system: OneSystemOption = "fam",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, max=LARGEST_INTEGER)] = 32,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question on a saved reading, token by token: the likeliest ones, or drawn by --temperature."""
    sampling = Sampling(temperature, top_p, seed)
    loaded_model, tokenizer = load_reader(model, system, device, dtype)
    loaded_state = FamState.load(state, loaded_model, batch_size=1)
    num_read = loaded_state.num_tokens_read
    with warnings_said():
        ids = question_ids(tokenizer, question, loaded_state, chat)
        pieces = trimmed(speak(loaded_model, tokenizer, ids, loaded_state, max_new_tokens, sampling, stop or ()))
        if as_json:
            facts = {"question": question, "answer": "".join(pieces), "num_tokens_read": num_read}
            print_json({**facts, "model": model, "system": system})
            return
        for piece in pieces:
            typer.echo(piece, nl=False)
    typer.echo()
