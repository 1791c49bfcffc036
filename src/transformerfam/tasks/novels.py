"""The two novels that come with the package; no shipped memory was trained on them."""

import difflib
import gzip
import importlib.resources
import io
from typing import IO

from transformerfam.errors import TransformerFamError

HELD_OUT_NOVELS = ("persuasion", "northanger_abbey")


def load_novel(name: str) -> str:
    """Return the text of a held-out novel of Jane Austen; arguments and errors are those of `open_novel`."""
    with open_novel(name) as file:
        return file.read().decode("utf-8")


def open_novel(name: str) -> IO[bytes]:
    """Open a held-out novel of Jane Austen as UTF-8 bytes.

    Args:
        name: "persuasion" (of the demo) or "northanger_abbey" (of the next-token measure).

    Raises:
        TransformerFamError: no novel of this name is in the package.
    """
    if name not in HELD_OUT_NOVELS:
        nearest = difflib.get_close_matches(name, HELD_OUT_NOVELS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"take one of {', '.join(HELD_OUT_NOVELS)}"
        raise TransformerFamError(f"there is no novel {name!r} in the package; {hint}")
    resource = importlib.resources.files("transformerfam") / "data" / "novels" / f"{name}.txt.gz"
    return io.BytesIO(gzip.decompress(resource.read_bytes()))
