"""Result rows: JSON lines on disk, and what those that are pooled must agree in."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.files.locks import hold_file
from transformerfam.files.reading import parse_json, read_whole, required_form
from transformerfam.files.writing import require_regular
from transformerfam.processes import process_share, uninterrupted

Row = dict[str, Any]

ROW_BEGINS = b'{"task": '
"""How every row that this package writes begins."""

ROW_SCHEMA = 1
"""Version of what the fields of a row mean, in its field `schema`; rows without that field are of schema 0, which
differs in nothing else."""

COMPRESSED, GZIP_BEGINS = ".gz", b"\x1f\x8b"
"""How the name of a compressed file ends, and how its content begins."""


class RowFile:
    """Append rows to a JSON lines file, each flushed at once; what is there already is kept.

    A last line that a killed run left unfinished is cut off. One process writes; of several that were launched together
    the first one holds the file for all.
    """

    def __init__(self, path: str | Path, replaces: bool = False) -> None:
        """Open the file, which is made if need be, with its folder.

        Args:
            path: JSON lines file.
            replaces: drop the rows that it holds.

        Raises:
            CorruptFileError: the file holds something else than rows.
            TransformerFamError: it cannot be written, another process writes it, or it is compressed, as rows that are
                published are: no row can be appended to it alone.
        """
        self.path = Path(path)
        if self.path.suffix == COMPRESSED:
            plain = self.path.with_suffix("")
            raise TransformerFamError(
                f"could not write {self.path}: rows are appended to a plain file, and this one is compressed; give "
                f"{plain}, which `gunzip -k {self.path}` makes of what is there and `gzip -9n {plain}` compresses again"
            )
        require_regular(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if process_share()[0] == 0:
                hold_file(self._file, str(self.path))
            self._file.seek(0)
            content = self._file.read()
            self.rows, num_whole = _rows_and_end(content, self.path)
            if replaces:
                self.rows, num_whole = [], 0
            self._cut(num_whole)
            if content[:num_whole] and not content[:num_whole].endswith(b"\n"):
                self._file.write(b"\n")
                self._file.flush()
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from error
        except TransformerFamError:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it.

        Raises:
            TransformerFamError: the disk is full; the rows before it are kept.
        """
        start = self._file.seek(0, 2)
        try:
            with uninterrupted():
                self._file.write(json.dumps(dict(row)).encode() + b"\n")
                self._file.flush()
        except OSError as error:
            self._cut(start)
            raise self._unwritable(error) from error
        self.rows.append(dict(row))

    def _cut(self, length: int) -> None:
        with contextlib.suppress(OSError):  # the next opening cuts an unfinished line too
            self._file.truncate(length)

    def _unwritable(self, error: OSError) -> TransformerFamError:
        return TransformerFamError(
            f"could not write {self.path}: {error.strerror or error}; rows before are kept; free space or choose "
            "another file, then run the same command again"
        )

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """Return the rows of all files, without one that is being written.

    Args:
        paths: JSON lines files, or such files compressed by gzip, whose names end in `.gz`.

    Raises:
        CorruptFileError: a file is missing, a line is no row, of which the message gives the number, or a row is in two
            of the files, where it would count twice; a compressed file is cut, damaged or not compressed.
    """
    rows: list[Row] = []
    files: dict[str, Path] = {}
    for path in map(Path, paths):
        try:
            content = read_whole(path)
        except OSError as error:
            raise CorruptFileError(
                f"cannot read {path} ({error.strerror}); a JSON lines file of rows is required, check the path"
            ) from error
        if path.suffix == COMPRESSED:
            own = list(_parse(_decompress(content, path), path))
        else:
            own = _rows_and_end(content, path)[0]
        texts = {json.dumps(row, sort_keys=True) for row in own}
        if both := sorted(texts & files.keys()):
            raise CorruptFileError(
                f"{path} has a row that {files[both[0]]} has, too, and it would count twice; give each row once"
            )
        files |= dict.fromkeys(texts, path)
        rows += own
    return rows


def _decompress(content: bytes, path: Path) -> bytes:
    """Return what a compressed file holds.

    Raises:
        CorruptFileError: it is cut, damaged or not compressed.
    """
    if not content.startswith(GZIP_BEGINS):
        raise CorruptFileError(
            f"{path} is not a gzip file; compress the rows with `gzip -9n`, or give the file a name that ends in .jsonl"
        )
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptFileError(f"{path} is cut or damaged ({error}); copy it again, or make its rows again") from error


def _rows_and_end(content: bytes, path: Path) -> tuple[list[Row], int]:
    """Return the rows of a file, and how many of its bytes are they: what follows is a row that a killed run began.

    Raises:
        CorruptFileError: a line is no row.
    """
    end = content.rfind(b"\n") + 1
    rows, rest = list(_parse(content[:end], path)), content[end:]
    try:
        return rows + list(_parse(rest, path, first=content.count(b"\n") + 1)), len(content)
    except CorruptFileError:
        if not _is_begun(rest):
            raise
        return rows, end


def _is_begun(line: bytes) -> bool:
    """Return whether a line is the beginning of a row, and no other text."""
    size = min(len(line), len(ROW_BEGINS))
    try:
        parse_json(line)
    except ValueError:
        return line[:size] == ROW_BEGINS[:size]
    return False


def _parse(content: bytes, path: Path, first: int = 1) -> Iterator[Row]:
    for number, line in enumerate(content.splitlines(), start=first):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or "task" not in row:
            raise CorruptFileError(
                f"line {number} of {path} is not a result row: {line[:60].decode(errors='replace')!r}; required is a "
                "JSON object with the field task, as `fam evaluate` writes them"
            )
        schema = row.get("schema", 0)
        if type(schema) is not int or not 0 <= schema <= ROW_SCHEMA:
            raise CorruptFileError(
                f"line {number} of {path} is a row of schema {schema!r}, this version reads 0 to {ROW_SCHEMA}; install "
                f"the version that wrote it (transformerfam {row.get('version', 'newer than this')}), or evaluate again"
            )
        yield row


def was_right(row: Row) -> bool:
    """Return whether a question was answered right.

    Raises:
        TypeError: the field is neither true nor false.
    """
    if type(row["correct"]) is not bool:
        raise TypeError(f"correct is {row['correct']!r}, required is true or false")
    return row["correct"]


def mixed_commits(rows: Iterable[Row]) -> str:
    """Return from which commits rows come, for a caption; nothing where all come from one."""
    commits = dict.fromkeys(str(row.get("git_commit", "unknown")) for row in rows)
    short = [f"{commit[:8]}{'+' if len(commit) > 8 and commit.endswith('+') else ''}" for commit in commits]
    return f"rows of {len(short)} commits: {', '.join(sorted(short))}" if len(short) > 1 else ""


def fields_of_rows() -> contextlib.AbstractContextManager[None]:
    """Return `required_form` of the fields of rows."""
    return required_form(
        "a row lacks a field, or has it in another form",
        "required are rows as `fam evaluate` and `fam compare` write them",
    )


def require_same_weights(
    rows: Iterable[Row], model_name: str, systems: Collection[str], weights: str, config: str | None = None
) -> None:
    """Refuse to add answers of a model to those that it gave with other weights or another configuration.

    Args:
        rows: the answers that are there; those without the fields `weights` and `config`, of earlier versions, are
            taken as they are.
        model_name: what rows call the model.
        systems: those that will answer.
        weights: digest of its weights.
        config: digest of its configuration; None takes any.

    Raises:
        StateMismatchError: there are answers with others.
    """
    for row in rows:
        if row.get("model") != model_name or row.get("system") not in systems:
            continue
        for name, here, what, why in (
            ("weights", weights, "other weights", "the model was changed or trained on"),
            ("config", config, "another configuration", "a field of the memory's configuration was changed"),
        ):
            there = row.get(name)
            if here is not None and there not in (None, here):
                raise StateMismatchError(
                    f"the rows of {row['system']} of {model_name} were answered with {what} ({there} there, {here} "
                    f"here): {why}; write the new answers to another file"
                )


ALIKE = {
    "weights": "were answered with different weights",
    "config": "were answered with different configurations",
    "questions": "answer different questions, with another text, wording or jitter",
}
"""Digests in which rows that are pooled agree; rows of earlier versions lack some."""


def require_alike(row: Row, known: Row) -> None:
    """Refuse a row that differs from others in the digests of `ALIKE`.

    Args:
        row: the row.
        known: digests of the others, to which those of the row are added.

    Raises:
        StateMismatchError: it differs.
    """
    for name, differ in ALIKE.items():
        there = row.get(name)
        if there is not None and known.setdefault(name, there) != there:
            raise StateMismatchError(
                f"the rows of {row['system']} of {row['model']} {differ} ({known[name]} and {there}); report them "
                "apart, or name the models apart"
            )
