"""Make plain text files of Jane Austen's six novels from the Debian package `r-cran-janeaustenr`.

The package data of `transformerfam` (the two held-out novels) and the training text of the recipes are made by this:

    apt-get download r-cran-janeaustenr
    dpkg-deb -x r-cran-janeaustenr_*.deb austen
    pip install rdata
    python scripts/prepare_books.py austen --training-folder books --data-folder src/transformerfam/data/novels

The same input gives the same bytes.
"""

import argparse
import gzip
import re
import sys
import zlib
from pathlib import Path
from typing import Any

DATABASE = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
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


def read_database(package_folder: Path) -> dict[str, list[str]]:
    """Return the lines of every text in the R lazy-load database of the extracted package."""
    import rdata

    path = package_folder / DATABASE
    if not path.is_file():
        raise SystemExit(f"{path} is missing; give the folder into which dpkg-deb -x extracted r-cran-janeaustenr")

    def parse(serialized: bytes) -> Any:
        return rdata.conversion.convert(rdata.parser.parse_data(serialized, extension=".rds"))

    database = path.read_bytes()
    index = parse(path.with_suffix(".rdx").read_bytes())
    texts = {}
    for name, (start, size) in index["variables"].items():
        serialized = zlib.decompress(database[start + LENGTH_BYTES : start + size])
        texts[str(name)] = [str(line) for line in parse(serialized)]
    return texts


def clean(lines: list[str], title: str) -> str:
    """Return the novel with one plain title page, without end marks and later editors' notes.

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


def main(arguments: list[str]) -> None:
    """Write the training novels as text and the held-out novels as gzip with equal bytes every time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package_folder", type=Path, help="folder with the extracted Debian package")
    parser.add_argument("--training-folder", type=Path, required=True, help="where the four training novels go")
    parser.add_argument("--data-folder", type=Path, help="where the held-out novels go")
    options = parser.parse_args(arguments)
    options.training_folder.mkdir(parents=True, exist_ok=True)
    if options.data_folder:
        options.data_folder.mkdir(parents=True, exist_ok=True)
    texts = read_database(options.package_folder)
    for source, (name, title, is_held_out) in NOVELS.items():
        encoded = clean(texts[source], title).encode("utf-8")
        if not is_held_out:
            (options.training_folder / f"{name}.txt").write_bytes(encoded)
        elif options.data_folder:
            (options.data_folder / f"{name}.txt.gz").write_bytes(gzip.compress(encoded, compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
