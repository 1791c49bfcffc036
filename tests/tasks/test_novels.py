"""The novels of the package."""

import gzip
import importlib.resources

import pytest

from transformerfam.errors import TransformerFamError
from transformerfam.sources.books import NOVELS
from transformerfam.tasks.novels import HELD_OUT_NOVELS, load_novel
from transformerfam.tasks.text import read_text


@pytest.mark.parametrize(("name", "title"), [("persuasion", "PERSUASION"), ("northanger_abbey", "NORTHANGER ABBEY")])
def test_load_novel_gives_the_whole_clean_text(name: str, title: str) -> None:
    """Catches a novel cut short, or with a later editor's note or title page in it."""
    text = load_novel(name)
    assert text.startswith(f"{title}\n\nby Jane Austen\n")
    assert text.isascii()
    assert len(text) > 400_000
    assert "A NOTE ON THE TEXT" not in text
    assert "\n\n\n\n" not in text


def test_load_novel_refuses_unknown_name_with_the_nearest() -> None:
    """Catches a bare FileNotFoundError for a typing error."""
    with pytest.raises(TransformerFamError, match="no novel 'persuation'.*did you mean persuasion"):
        load_novel("persuation")
    with pytest.raises(TransformerFamError, match="no novel 'ulysses'.*persuasion, northanger_abbey"):
        load_novel("ulysses")


def test_novel_is_read_by_its_name_where_a_file_is() -> None:
    """Catches a measurement on a novel for which users must unpack the package's own data."""
    assert read_text("persuasion") == load_novel("persuasion")


@pytest.mark.parametrize("name", HELD_OUT_NOVELS)
def test_novel_files_hold_no_time_stamp(name: str) -> None:
    """Catches package data that differs each time it is made."""
    stored = (importlib.resources.files("transformerfam") / "data" / "novels" / f"{name}.txt.gz").read_bytes()
    assert stored[4:8] == bytes(4)  # gzip's modification time
    assert gzip.compress(gzip.decompress(stored), compresslevel=9, mtime=0)[4:8] == bytes(4)


def test_held_out_novels_are_those_of_the_books() -> None:
    """Catches a held-out novel among the books to train on."""
    assert {name for name, _, is_held_out in NOVELS.values() if is_held_out} == set(HELD_OUT_NOVELS)
