"""The novels of the package and the script that made them."""

import gzip
import importlib.resources
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.novels import HELD_OUT_NOVELS, load_novel
from transformerfam.tasks.text import read_text

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_books.py"


@pytest.fixture(scope="module")
def prepare_books() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_books", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    """Catches a measurement on a novel that asks its user to unpack the package's own data."""
    assert read_text("persuasion") == load_novel("persuasion")


@pytest.mark.parametrize("name", HELD_OUT_NOVELS)
def test_novel_files_hold_no_time_stamp(name: str) -> None:
    """Catches package data that differs each time it is made."""
    stored = (importlib.resources.files("transformerfam") / "data" / "novels" / f"{name}.txt.gz").read_bytes()
    assert stored[4:8] == bytes(4)  # gzip's modification time
    assert gzip.compress(gzip.decompress(stored), compresslevel=9, mtime=0)[4:8] == bytes(4)


def test_held_out_novels_are_those_of_the_script(prepare_books: ModuleType) -> None:
    """Catches a held-out novel that the script writes to the training folder."""
    held_out = {name for name, _, is_held_out in prepare_books.NOVELS.values() if is_held_out}
    assert held_out == set(HELD_OUT_NOVELS)


def test_clean_drops_title_page_end_mark_and_editors_remarks(prepare_books: ModuleType) -> None:
    """Catches remarks of an edition that would be learned as the author's."""
    lines = [
        "A Novel",
        "(1811)",
        "",
        "CHAPTER 1",
        "",
        "It began.",
        "",
        "",
        "",
        "",
        "[At this point in the first",
        "edition.]",
    ]
    text = prepare_books.clean(
        [*lines, "", "It went on. ", "", "THE END", "", "A NOTE ON THE TEXT", "Signed"], "A Novel"
    )
    assert text == "A NOVEL\n\nby Jane Austen\n\n\nCHAPTER 1\n\nIt began.\n\n\nIt went on.\n"
