"""The share of the gap: its numbers, its intervals, when it counts, and the command that shows it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import TransformerFamError
from transformerfam.reports.gap import gap_of, gap_rows
from transformerfam.reports.rows import read_rows


def row(system: str, document: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "documents",
        "system": system,
        "model": "m",
        "seed": 0,
        "text": "novel",
        "text_digest": "d",
        "document": document,
        "first_token": 1024,
        "loss": loss,
        "num_predicted": 100,
        "questions": "q",
        "state_bytes": 1000 if system == "fam" else 1200,
        "fam_length": 16,
        "num_memory_segments": 1,
    } | more


def rows_of(fam: float, bswa: float, full: float, number: int = 5) -> list[dict[str, Any]]:
    """Return documents that are easy and hard, with the same differences in each."""
    return [
        row(system, document, loss + document)
        for document in range(number)
        for system, loss in (("fam", fam), ("bswa", bswa), ("full_context", full))
    ]


def by_system(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[r for r in rows if r["system"] == system] for system in ("fam", "bswa", "full_context")]


def test_share_is_the_gain_over_the_gap_document_by_document() -> None:
    """Catches a share of the wrong sign, and intervals as wide as documents are different."""
    gap = gap_of(*by_system(rows_of(3.1, 3.2, 3.0)))
    assert gap is not None
    assert gap.share.mean == pytest.approx(0.5)
    assert gap.gain == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1))
    assert gap.gap.mean == pytest.approx(0.2)
    assert (gap.fam, gap.bswa, gap.full) == (pytest.approx(5.1), pytest.approx(5.2), pytest.approx(5.0))
    assert gap.counts
    small = gap_of(*by_system(rows_of(3.0, 3.01, 3.0)))
    assert small is not None
    assert not small.counts


def test_documents_that_one_system_lacks_do_not_count() -> None:
    """Catches means over different documents."""
    rows = rows_of(3.1, 3.2, 3.0)
    rows = [r for r in rows if (r["system"], r["document"]) != ("fam", 4)] + [row("bswa", 9, 99.0)]
    gap = gap_of(*by_system(rows))
    assert gap is not None
    assert gap.bswa == pytest.approx(3.2 + 1.5)
    assert gap_of([], *by_system(rows)[1:]) is None


def test_texts_of_one_name_are_not_pooled() -> None:
    """Catches a share over a text before and after it was changed."""
    rows = rows_of(3.1, 3.2, 3.0) + [r | {"text_digest": "e"} for r in rows_of(3.2, 3.2, 3.0)]
    found = gap_rows(rows, {"fam": "fam", "bswa": "bswa", "full": "full_context"})
    assert [round(one["share"][0], 6) for one in found] == [0.5, 0.0]


def test_parts_before_the_least_place_are_left_out() -> None:
    """Catches a share that counts tokens which every window still sees."""
    rows = rows_of(3.1, 3.2, 3.0) + [row(s, 0, 50.0, first_token=0) for s in ("fam", "bswa", "full_context")]
    systems = {"fam": "fam", "bswa": "m, bswa", "full": "full_context"}
    (found,) = gap_rows(rows, systems)
    assert found["share"][0] == pytest.approx(0.5)
    assert (found["state_bytes"], found["state_bytes_bswa"], found["fam_length"]) == (1000, 1200, 16)
    with pytest.raises(TransformerFamError, match="--fam is 'fan', required is one of m, bswa, m, f"):
        gap_rows(rows, systems | {"fam": "fan"})


def test_command_shows_and_writes_the_share(tmp_path: Path) -> None:
    """Catches rows without where they come from, and a table without a number."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows_of(3.1, 3.2, 3.0)))
    command = ["report", "gap", str(path), "--fam", "fam", "--bswa", "bswa", "--output", str(tmp_path / "gap.jsonl")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (written,) = read_rows([tmp_path / "gap.jsonl"])
    assert written["share"][0] == pytest.approx(0.5)
    assert written["git_commit"]
    refused = CliRunner().invoke(app, [*command, "--least-place", "5000"])
    assert "required is one of" in refused.output
