"""The subcommand `fam generate`."""

from pathlib import Path
from typing import Annotated

import typer

from transformerfam.cli.loading import load, warnings_said
from transformerfam.cli.options import DeviceOption, DtypeOption, ModelOption
from transformerfam.fam.state import FamState
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.tasks.reading import generate_text


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
    loaded_model, tokenizer = load(model, device=device, dtype=dtype)
    loaded_state = FamState.load(state, loaded_model, batch_size=1)
    with warnings_said():
        answer = generate_text(loaded_model, tokenizer, question, loaded_state, max_new_tokens, chat)
    typer.echo(answer)
