"""Theorems: the files of HOL Light, whose lemmas cite those of before, in the place of the paper's Isabelle proofs."""

from collections.abc import Mapping
from pathlib import Path

from transformerfam.sources.overlap import Shingles
from transformerfam.sources.package import Package
from transformerfam.sources.source import Source, Text, Written, is_held_out

HOL_LIGHT = Package(
    manager="apt",
    name="hol-light",
    version="20230128-1+b1",
    file="hol-light_20230128-1+b1_amd64.deb",
    sha256="9e908b3bf1e689769deee58f85df1cfc89b95aef00dcca087d65c89cd9020dfe",
    num_bytes=5768384,
    licence="BSD-2-Clause",
    members=("usr/share/hol-light/*.ml",),
)
HELD_OUT = 0.1
"""Share of the files that are held out, by their names."""
LEAST_BYTES = 4096
MOST_SHARED = 0.05
"""Share of its shingles that a file may have in common with all files of the other split; else it is in none."""


def prepare(unpacked: Mapping[str, Path]) -> Written:
    """Make the files of both splits; those that repeat parts of the other split are left out."""
    root = unpacked[HOL_LIGHT.name] / "usr/share/hol-light"
    texts: list[Text] = []
    for path in sorted(root.rglob("*.ml")):
        name = path.relative_to(root).as_posix()
        if path.stat().st_size >= LEAST_BYTES and not path.stem.endswith("database"):  # which list others' names
            texts.append((f"{name.removesuffix('.ml').replace('/', '--')}.ml.txt", path.read_text(encoding="latin-1")))
    test = [(name, text) for name, text in texts if is_held_out(name, HELD_OUT)]
    held_out = Shingles(text for _, text in test)
    rest = [(name, text) for name, text in texts if not is_held_out(name, HELD_OUT)]
    train = [(name, text) for name, text in rest if held_out.share_of(text) <= MOST_SHARED]
    trained_on = Shingles(text for _, text in train)
    return {
        "train": train,
        "test": [(name, text) for name, text in test if trained_on.share_of(text) <= MOST_SHARED],
    }


SOURCE = Source(
    name="theorems",
    about="formal proofs of HOL Light, a tenth of the files held out",
    packages=(HOL_LIGHT,),
    prepare=prepare,
)
