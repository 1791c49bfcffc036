"""The repository is light: rows are compressed, each has a page that needs it, and no link of a page leads nowhere."""

import re
import subprocess
from pathlib import Path

import pytest

from transformerfam.reports.rows import read_rows

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "results").glob("*.jsonl.gz"))
MOST_BYTES, MOST_BYTES_OF_ROWS = 25_000_000, 3_000_000


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Return the files that git tracks, without those that are deleted and not yet committed."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    names = [name for name in listed.split("\0") if name]
    if "tests/promises/test_light.py" not in names:
        pytest.skip("the checkout is of another repository, in which this one is a folder")
    return [path for path in (ROOT / name for name in names) if path.is_file()]


def num_bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def test_tracked_files_stay_light(tracked: list[Path]) -> None:
    """Catches raw rows, run logs and memories of trials that are committed, from which no commit frees a clone."""
    assert num_bytes(tracked) <= MOST_BYTES


def test_rows_stay_light_and_out_of_the_documents(tracked: list[Path]) -> None:
    """Catches rows that are committed uncompressed, or next to the page that shows them."""
    rows = [path for path in tracked if path.is_relative_to(ROOT / "results")]
    assert num_bytes(rows) <= MOST_BYTES_OF_ROWS
    assert {path.name.partition(".")[2] for path in rows} == {"jsonl.gz", "md"}
    assert [path for path in tracked if path.suffix in (".jsonl", ".gz") and path.is_relative_to(ROOT / "docs")] == []


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_rows_are_readable_and_needed_by_a_page(path: Path) -> None:
    """Catches rows that no page names any more, that no command reads, or whose bytes depend on the day."""
    pages = [page for folder in ("docs", "research", "src") for page in (ROOT / folder).rglob("*.md")]
    assert any(f"results/{path.name}" in page.read_text(encoding="utf-8") for page in pages)
    assert path.read_bytes()[3:8] == bytes(5), "a name or a time in the header: compress with gzip -9n"
    if not path.name.endswith("_log.jsonl.gz"):  # steps of a training, which are no rows
        assert read_rows([path])


def test_links_of_all_pages_lead_somewhere(tracked: list[Path]) -> None:
    """Catches links to pages and pictures that were moved, and rows that a page names and that are gone."""
    for page in (path for path in tracked if path.suffix == ".md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
        for name in re.findall(r"\bresults/\w+\.jsonl\.gz", text):
            assert (ROOT / name).is_file(), f"{page.relative_to(ROOT)}: {name}"
