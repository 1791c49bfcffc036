"""Rows that are compressed, of other schemas, and of several commits."""

import gzip
import json
import re

import pytest

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.reports.next_token import next_token_table
from transformerfam.reports.passkey import passkey_table
from transformerfam.reports.rows import ROW_SCHEMA, RowFile, mixed_commits, read_rows

ROWS = [{"task": "passkey", "n": number, "answer": f"{number:05}"} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def compressed(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES, mtime=0))
    return path


def test_compressed_rows_are_read_as_the_plain_ones(tmp_path, compressed):
    """Would catch published rows that no command reads, or reads in part, as of two members joined by `cat`."""
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(LINES)
    assert read_rows([compressed]) == read_rows([plain]) == ROWS
    with pytest.raises(CorruptFileError, match=r"rows.jsonl.gz has a row that .*plain.jsonl has, too"):
        read_rows([plain, compressed])
    half = len(LINES) // 2
    compressed.write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    assert read_rows([compressed]) == ROWS


@pytest.mark.parametrize("kept", [5, 60, -9, -1])
def test_cut_compressed_rows_are_refused(compressed, kept):
    """Would catch a table of the rows before the cut that is silent about those after it."""
    compressed.write_bytes(compressed.read_bytes()[:kept])
    with pytest.raises(CorruptFileError, match=r"rows.jsonl.gz is cut or damaged .*copy it again"):
        read_rows([compressed])


def test_damaged_compressed_rows_are_refused(compressed):
    """Would catch a flipped bit that gives another answer."""
    content = bytearray(compressed.read_bytes())
    content[len(content) // 2] ^= 64
    compressed.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"rows.jsonl.gz is cut or damaged"):
        read_rows([compressed])


def test_half_a_row_in_a_whole_compressed_file_is_refused(compressed):
    """Would catch rows that were compressed while they were written: in a plain file half a row is one to come."""
    compressed.write_bytes(gzip.compress(LINES[:-20]))
    with pytest.raises(CorruptFileError, match="line 300 of .*rows.jsonl.gz is not a result row"):
        read_rows([compressed])


def test_plain_rows_named_as_compressed_are_refused(compressed):
    """Would catch a bare BadGzipFile."""
    compressed.write_bytes(LINES)
    with pytest.raises(CorruptFileError, match=r"rows.jsonl.gz is not a gzip file; .*gzip -9n.*ends in .jsonl"):
        read_rows([compressed])
    compressed.write_bytes(b"")
    with pytest.raises(CorruptFileError, match="is not a gzip file"):
        read_rows([compressed])


def test_compressed_rows_are_not_appended_to(compressed, tmp_path):
    """Would catch plain lines after compressed ones, and a file named .gz that is not compressed."""
    before = compressed.read_bytes()
    remedy = re.escape(f"give {tmp_path / 'rows.jsonl'}, which `gunzip -k {compressed}` makes")
    with pytest.raises(TransformerFamError, match=f"could not write {re.escape(str(compressed))}: .*{remedy}"):
        RowFile(compressed)
    assert compressed.read_bytes() == before
    with pytest.raises(TransformerFamError, match="rows are appended to a plain file"):
        RowFile(tmp_path / "new.jsonl.gz")
    assert not (tmp_path / "new.jsonl.gz").exists()


def test_rows_without_a_schema_are_read_and_newer_ones_refused(tmp_path):
    """Would catch fields of a later version taken for what they meant before."""
    path = tmp_path / "rows.jsonl"
    rows = [{"task": "a"}, {"task": "a", "schema": 0}, {"task": "a", "schema": ROW_SCHEMA}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows([path]) == rows
    for schema in (ROW_SCHEMA + 1, -1, True, "1", None, 1.0):
        newer = json.dumps({"task": "a", "schema": schema, "version": "9.1"})
        path.write_text(f'{{"task": "a"}}\n{newer}\n')
        for use in (RowFile, lambda p: read_rows([p])):
            with pytest.raises(CorruptFileError, match=rf"line 2 of .* schema {schema!r}, .*install .*fam 9.1"):
                use(path)


def test_tables_say_that_rows_are_of_several_commits():
    """Would catch numbers of two states of the code in one table that looks like one run."""
    old, new = "0123456789abcdef", "fedcba9876543210+"
    passkey = {"task": "passkey", "system": "fam", "model": "tiny", "filler_tokens": 8, "correct": True}
    tokens = {"task": "next-token", "system": "fam", "model": "tiny", "file": "f", "first_token": 1, "num_tokens": 2}
    tokens |= {"loss": 1.0, "accuracy": 0.5}
    other = {"task": "other", "git_commit": "3" * 40}
    for table, row in ((passkey_table, passkey), (next_token_table, tokens)):
        rows = [row | {"git_commit": commit} for commit in (new, old, old)]
        assert "commits" not in str(table([*rows[1:], other]).caption)
        assert str(table([*rows, other]).caption).endswith("rows of 2 commits: 01234567, fedcba98+")
    assert mixed_commits([{}, {}]) == ""
    assert mixed_commits([{}, {"git_commit": old}]) == "rows of 2 commits: 01234567, unknown"
