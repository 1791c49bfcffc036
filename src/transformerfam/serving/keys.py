"""API keys that a server is given."""

from collections.abc import Iterable

from transformerfam.errors import TransformerFamError


def require_keys(keys: Iterable[str], where: str) -> tuple[str, ...]:
    """Return keys that a header can hold.

    Args:
        keys: as they were given.
        where: by what, for the message.

    Raises:
        TransformerFamError: one is none.
    """
    keys = tuple(keys)
    if any(not key or not key.isascii() or any(c.isspace() for c in key) for key in keys):
        raise TransformerFamError(f"{where} is empty or has spaces or letters beyond ASCII; choose another key")
    return keys
