"""What the commands print besides their results."""

from rich.markup import escape

from transformerfam.cli.progress import screen


def say(message: str) -> None:
    """Print one line to standard error, neither wrapped nor read as markup."""
    screen(soft_wrap=True).print(escape(message), highlight=False)
