"""Commands within the test's process."""

from typing import Any

from typer.testing import CliRunner

from transformerfam.cli.app import app


def run(*arguments: Any, status: int = 0, stdin: str | bytes | None = None) -> str:
    """Run a command, require its exit status, and return what it says on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


def run_passkey(folder: Any, output: Any, *more: Any, **options: Any) -> str:
    """Evaluate passkeys with a folder's model, two keys at two lengths; see `run`."""
    fixed = ("--model", folder, "--filler-tokens", "0,30", "--num-keys", 2, "--seed", 1, "--output", output)
    return run("evaluate", "passkey", *fixed, *more, **options)
