"""The subcommand `fam chat`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformerfam.cli.loading import load, warnings_said
from transformerfam.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopPOption,
)
from transformerfam.cli.output import say
from transformerfam.decoder.generation import read_last_tokens
from transformerfam.errors import TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.files.tensors import require_target
from transformerfam.serving.chat import ChatTemplate
from transformerfam.serving.schemas import Message
from transformerfam.tasks.sampling import Sampling
from transformerfam.tasks.speaking import speak, trimmed
from transformerfam.tasks.text import encode_rest, encode_start, read_text
from transformerfam.tasks.unknown_words import say_unknown

HELP = (
    "/save FILE keeps the chat as a state; /load FILE continues one, of a book, too; /fork NAME keeps a copy, to which "
    "/load NAME goes back; /help says this; /quit, or the end of the input, ends the chat"
)


class Chat:
    """A chat whose turns are read once each.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        template: form of a chat.
        state: what was read before; None: nothing.
    """

    def __init__(self, model: Any, tokenizer: Any, template: ChatTemplate, state: FamState | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.closing = template.closing()
        self.state = self._blank() if state is None else state
        self.forks: dict[str, FamState] = {}

    def _blank(self) -> FamState:
        with torch.no_grad():
            blank: FamState = self.model.init_state()
        return blank

    def turn(self, text: str, max_new_tokens: int, sampling: Sampling, stops: Sequence[str]) -> Any:
        """Yield the answer to a turn, as it comes."""
        message = Message(role="user", content=text)
        begins = self.state.num_tokens_read == 0
        asked = self.template.first([message]) if begins else self.template.following([message])[len(self.closing) :]
        ids = (encode_start if begins else encode_rest)(self.tokenizer, asked)
        say_unknown(self.tokenizer, ids, "the turn")
        before = self.state.fork()
        try:
            yield from speak(self.model, self.tokenizer, ids, self.state, max_new_tokens, sampling, stops)
            read_last_tokens(self.model, self.state)
            if closing := encode_rest(self.tokenizer, self.closing):
                self.model.read([closing], self.state)
        except BaseException:  # half a turn is none
            self.state = before
            raise

    def command(self, line: str) -> str:
        """Do what a line that begins with / says, and return what to say of it.

        Raises:
            TransformerFamError: there is no such command, or it fails.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            return HELP
        if name not in ("/save", "/load", "/fork") or not value:
            raise TransformerFamError(f"{line!r} is no command of the chat; {HELP}")
        if name == "/fork":
            self.forks[value] = self.state.fork().compact()
            return f"kept a copy of {self.state.num_tokens_read:,} tokens as {value}"
        if name == "/save":
            require_target(value, "state", overwrite=True)
            self.state.save(value)
            return f"saved {self.state.num_tokens_read:,} tokens in {value} ({self.state.file_bytes:,} bytes)"
        if value in self.forks:
            self.state = self.forks[value].fork()
        else:
            self.state = FamState.load(value, self.model, batch_size=1)
        return f"continuing after {self.state.num_tokens_read:,} tokens of {value}"


def chat_command(
    model: ModelOption = "smollm2",
    state: Annotated[Path | None, typer.Option("--state", help="Continue after this state; it stays as it is.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, max=LARGEST_INTEGER)] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja template in place of the tokenizer's.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Chat in the terminal: a line is a turn, read once; /save, /load and /fork keep and continue the chat."""
    sampling = Sampling(temperature, top_p, seed)
    template_text = None if chat_template is None else read_text(chat_template)
    loaded_model, tokenizer = load(model, device=device, dtype=dtype)
    template = ChatTemplate(tokenizer, template_text)
    if not template.template:
        raise TransformerFamError("the tokenizer has no chat template; give --chat-template FILE, or use fam generate")
    before = None if state is None else FamState.load(state, loaded_model, batch_size=1)
    chat = Chat(loaded_model, tokenizer, template, before)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        say(HELP)
    while (line := _next_line(is_terminal)) is not None and line.strip() != "/quit":
        try:
            with warnings_said():
                if line.startswith("/"):
                    say(chat.command(line.strip()))
                elif line.strip():
                    for piece in trimmed(chat.turn(line.strip(), max_new_tokens, sampling, stop or ())):
                        typer.echo(piece, nl=False)
                    typer.echo()
        except TransformerFamError as error:
            if not is_terminal:  # a script is to know
                raise
            say(str(error))


def _next_line(is_terminal: bool) -> str | None:
    """Return the next line of the input, None at its end."""
    if is_terminal:
        typer.echo("> ", nl=False)
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\n") if line else None
