"""The command `fam`: its subcommands, each of a module that parses, calls one function, and prints."""

import typer

from transformerfam.cli.average import average_command
from transformerfam.cli.chat import chat_command
from transformerfam.cli.compare import compare_command
from transformerfam.cli.convert import convert_command
from transformerfam.cli.data import data_app
from transformerfam.cli.demo import demo_command
from transformerfam.cli.evaluate import evaluate_app
from transformerfam.cli.generate import generate_command
from transformerfam.cli.overview import COMMANDS, Commands, main
from transformerfam.cli.plan import plan_command
from transformerfam.cli.read import read_command
from transformerfam.cli.report import report_app
from transformerfam.cli.serve import serve_command
from transformerfam.cli.study import study_command
from transformerfam.cli.train import train_command

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)
app.callback()(main)
app.command("read")(read_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command("serve")(serve_command)
app.command("study")(study_command)
app.command("convert")(convert_command)
app.command("train")(train_command)
app.command("average")(average_command)
app.add_typer(evaluate_app, name="evaluate", help=COMMANDS["evaluate"])
app.command("compare")(compare_command)
app.add_typer(report_app, name="report", help=COMMANDS["report"])
app.command("plan")(plan_command)
app.add_typer(data_app, name="data", help=COMMANDS["data"])
app.command("demo")(demo_command)
