"""The subcommands of `fam evaluate`."""

import typer

from transformerfam.cli.evaluate_answers import evaluate_answers_command
from transformerfam.cli.evaluate_documents import evaluate_documents_command
from transformerfam.cli.evaluate_next_token import evaluate_next_token_command
from transformerfam.cli.evaluate_passkey import evaluate_passkey_command

evaluate_app = typer.Typer(no_args_is_help=True)
evaluate_app.command("answers")(evaluate_answers_command)
evaluate_app.command("passkey")(evaluate_passkey_command)
evaluate_app.command("next-token")(evaluate_next_token_command)
evaluate_app.command("documents")(evaluate_documents_command)
