"""All sources by name."""

import difflib

from transformerfam.errors import TransformerFamError
from transformerfam.sources import books, questions, ruler, short, stories, theorems
from transformerfam.sources.source import Source

SOURCES = {module.SOURCE.name: module.SOURCE for module in (books, theorems, questions, stories, short, ruler)}


def source_named(name: str) -> Source:
    """Return a source.

    Raises:
        TransformerFamError: there is none of this name; the nearest is named.
    """
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"take one of {', '.join(SOURCES)}"
        raise TransformerFamError(f"there is no source {name!r}; {hint}")
    return SOURCES[name]
