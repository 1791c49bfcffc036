"""The command `fam`: the application of all commands, whose modules are imported when they are called."""

import pkgutil
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from transformerfam.cli.commands import COMMANDS, ROOM, Command, Group
from transformerfam.cli.errors import TRACEBACK, ErrorsInOneLine
from transformerfam.cli.verbosity import LEVEL, Verbosity, hide_loading_bars, versions_text

EVERYWHERE = "Everywhere"
"""What help calls the options of every command."""


def _add_level(ctx: typer.Context, param: typer.CallbackParam, value: bool) -> bool:
    """Let `--quiet` or `--verbose` hold until the command ends."""
    if value and not ctx.resilient_parsing:
        ctx.find_root().with_resource(LEVEL.set_to(Verbosity[str(param.name).upper()]))
    return value


def _show_version(ctx: typer.Context, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        typer.echo(versions_text())
        raise typer.Exit


QuietOption = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", callback=_add_level, help="Print results and errors alone.", rich_help_panel=EVERYWHERE
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "-v", "--verbose", callback=_add_level, help="Also show what libraries log.", rich_help_panel=EVERYWHERE
    ),
]


def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions, and exit."),
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show where an error comes from.", rich_help_panel=EVERYWHERE)
    ] = False,
) -> None:
    """TransformerFAM: read input of any length in constant memory, and still use it."""


def _of_every_command(quiet: QuietOption = False, verbose: VerboseOption = False) -> None:
    """Have the options that `fam` itself and each of its commands take."""


def command_of(name: str, function: Callable[..., Any]) -> Any:
    """Return the command of a function, with the options of every command."""
    command, everywhere = _built(name, function), _built(name, _of_every_command)
    for option in everywhere.params:
        option.expose_value = False
    command.params += everywhere.params
    return command


def _built(name: str, function: Callable[..., Any]) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name)(function)
    return typer.main.get_command(single)


def function_of(command: Command) -> Callable[..., Any]:
    """Import a command's module, and return its function."""
    function: Callable[..., Any] = pkgutil.resolve_name(f"{ROOM}.{command.place}")
    return function


class LaterCommand(TyperCommand):
    """A command of which name and help are known, and whose module is imported when it is called."""

    entry: Command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments of the command itself."""
        function = function_of(self.entry)
        if "transformers" in sys.modules:
            hide_loading_bars()
        return command_of(str(self.name), function).make_context(info_name, args, parent, **extra)


class Commands(ErrorsInOneLine):
    """The commands of `fam`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return their names in the order of `COMMANDS`."""
        return sorted(super().list_commands(ctx), key=list(COMMANDS).index)


class WithDefault(TyperGroup):
    """Commands of which one is meant where a word is none of them."""

    default: str | None = None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of a command line."""
        if self.default is not None and args and args[0] not in self.commands:
            args = [self.default, *args]
        return super().resolve_command(ctx, args)


def _add(to: typer.Typer, name: str, entry: Command) -> None:
    kind: type[TyperCommand] = type("LaterCommand", (LaterCommand,), {"entry": entry})
    to.command(name, cls=kind, help=entry.help)(lambda: None)


app = typer.Typer(
    cls=Commands,
    callback=main,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for first, item in COMMANDS.items():
    if isinstance(item, Group):
        named = type("WithDefault", (WithDefault,), {"default": item.default})
        group = typer.Typer(cls=named, callback=_of_every_command, no_args_is_help=True)
        for second, command in item.commands.items():
            _add(group, second, command)
        app.add_typer(group, name=first, help=item.help)
    else:
        _add(app, first, item)
