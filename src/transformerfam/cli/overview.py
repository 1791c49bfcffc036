"""What `fam --help` shows, without what the commands need: torch and transformers take seconds to import."""

from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from transformerfam.cli.errors import TRACEBACK, ErrorsInOneLine

COMMANDS = {
    "read": "Read a text of any length and save the state; if interrupted, save it and print the command that resumes.",
    "generate": "Answer a question on a saved reading, token by token: the likeliest ones, or drawn by --temperature.",
    "chat": "Chat in the terminal: a line is a turn, read once; /save, /load and /fork keep and continue the chat.",
    "serve": "Serve a model and its memories over HTTP: OpenAI's API, and /v1/memories.",
    "study": "Read a text, then improve the rows of the reading by questions that the model makes of it itself.",
    "convert": "Give a model an untrained memory, and save it with its weights; gated with 4 sink tokens.",
    "train": "Train a memory by a recipe.",
    "average": "Average the weights of memories; --set changes what the mean is read with.",
    "evaluate": "Measure a model; rows go to a JSON lines file.",
    "compare": "Train and evaluate every system of a comparison alike; stop at any time, the same command resumes.",
    "report": "Tables and figures of result rows, and pictures of attention.",
    "plan": "Say what a model will need, without its weights: parameters, bytes, operations, hours.",
    "data": "Fetch texts and questions to train on and to measure with.",
    "demo": "Hide a key on the first page of a novel, read the novel, query the key: FAM next to BSWA.",
}
"""Every command, in the order of the list, with the first line of its help."""


class Commands(ErrorsInOneLine):
    """The commands of `fam`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return their names in the order of `COMMANDS`."""
        return sorted(super().list_commands(ctx), key=list(COMMANDS).index)


def main(
    traceback: Annotated[bool, typer.Option(TRACEBACK, help="Show where an error comes from.")] = False,
) -> None:
    """TransformerFAM: read input of any length in constant memory, and still use it."""


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether a command line requests the list of commands alone."""
    return set(arguments) <= {"--help"}


def show(arguments: Sequence[str]) -> NoReturn:
    """Print the list of commands, and end."""
    app = typer.Typer(cls=Commands, callback=main, no_args_is_help=True, add_completion=False)
    for command, text in COMMANDS.items():
        app.command(command, help=text)(lambda: None)
    app(list(arguments))
    raise AssertionError("a command line ends its process")
