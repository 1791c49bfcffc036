"""What the commands print beside their results."""

from rich.console import Console
from rich.markup import escape


def say(message: str) -> None:
    """Print one line to standard error, neither wrapped nor read as markup."""
    Console(stderr=True, soft_wrap=True).print(escape(message), highlight=False)
