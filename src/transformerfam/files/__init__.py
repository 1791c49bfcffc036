"""Files: written whole or not at all, read strictly, one writer at a time.

`tensors` has the files of this package, with a kind, a version and a checksum; `writing` puts any file in its place,
`reading` reads small ones, `locks` keeps other processes away.

May import: `errors`.
"""

from transformerfam.files.reading import parse_toml
from transformerfam.files.tensors import CHECKSUM_KEY, METADATA_KEY, digest_tensors, load_tensors, save_tensors
from transformerfam.files.writing import write_text

__all__ = [
    "CHECKSUM_KEY",
    "METADATA_KEY",
    "digest_tensors",
    "load_tensors",
    "parse_toml",
    "save_tensors",
    "write_text",
]
