"""Result rows: JSON lines on disk, and the accuracies that follow from them."""

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from transformerfam.errors import CorruptFileError, StateMismatchError, TransformerFamError
from transformerfam.files import hold_file, parse_json, read_whole, require_regular, required_form
from transformerfam.processes import process_share, uninterrupted
from transformerfam.reports.telling import Telling

Row = dict[str, Any]

ROW_BEGINS = b'{"task": '
"""How every row that this package writes begins."""

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


class RowFile:
    """Append rows to a JSON lines file, each flushed at once; what stands there already is kept.

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
            TransformerFamError: it cannot be written, or another process writes it.
        """
        self.path = Path(path)
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

    Raises:
        CorruptFileError: a file is missing, a line is no row, of which the message gives the number, or a row is in two
            of the files, where it would count twice.
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
        own = _rows_and_end(content, path)[0]
        texts = {json.dumps(row, sort_keys=True) for row in own}
        if both := sorted(texts & files.keys()):
            raise CorruptFileError(
                f"{path} has a row that {files[both[0]]} has, too, and it would count twice; give each row once"
            )
        files |= dict.fromkeys(texts, path)
        rows += own
    return rows


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
    """Say whether a line is the beginning of a row, and no other text."""
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
                f"line {number} of {path} is no result row: {line[:60].decode(errors='replace')!r}; required is a JSON "
                "object with the field task, as `fam evaluate` writes them"
            )
        yield row


def fields_of_rows() -> contextlib.AbstractContextManager[None]:
    """Return `required_form` of the fields of rows."""
    return required_form(
        "a row lacks a field, or has it in another form",
        "required are rows as `fam evaluate` and `fam compare` write them",
    )


def wilson_interval(num_correct: int, num_questions: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Args:
        num_correct: right answers.
        num_questions: answers in all, at least 1.
    """
    assert 0 <= num_correct <= num_questions, "more right answers than questions"
    assert num_questions >= 1, "a share of nothing"
    share = num_correct / num_questions
    scale = 1 + Z_95**2 / num_questions
    middle = (share + Z_95**2 / (2 * num_questions)) / scale
    half = Z_95 * math.sqrt(share * (1 - share) / num_questions + Z_95**2 / (4 * num_questions**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


class Accuracy(NamedTuple):
    """The share of passkeys recalled at one length, with its 95 % Wilson interval."""

    filler_tokens: int
    num_correct: int
    num_questions: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Right answers over questions."""
        return self.num_correct / self.num_questions


class Series(NamedTuple):
    """What makes one curve: rows that differ in anything of this are not pooled."""

    model: str
    system: str
    filler: str
    telling: Telling = Telling()

    def label(self, others: Iterable["Series"]) -> str:
        """Return the shortest name that tells this curve from the `others`: system, then what differs."""
        others = list(others)
        parts = [self.system]
        if len({series.model for series in others}) > 1:
            parts.insert(0, self.model)
        if len({series.filler for series in others}) > 1:
            parts.append(f"({self.filler})")
        if len({series.telling for series in others}) > 1:
            parts.append(self.telling.label([series.telling for series in others]))
        return " ".join(parts)


def require_same_weights(
    rows: Iterable[Row], model_name: str, systems: Collection[str], weights: str, config: str | None = None
) -> None:
    """Refuse to put answers of a model beside those that it gave with other weights, or another configuration.

    Args:
        rows: the answers that are there; those without the fields `weights` and `config`, of earlier versions, are
            taken as they are.
        model_name: what rows call the model.
        systems: what is asked of it.
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
                    f"here): {why}; give the new answers a file of their own"
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


def accuracy_by_length(rows: Iterable[Row]) -> dict[Series, list[Accuracy]]:
    """Return every curve of the passkey rows, lengths ascending; rows of other tasks are left out.

    Raises:
        StateMismatchError: rows of one curve and seed are of different weights, configurations or questions.
    """
    counts: dict[Series, dict[int, list[int]]] = {}
    known: dict[tuple[Series, Any], Row] = {}
    for row in rows:
        if row["task"] != "passkey":
            continue
        series = Series(str(row["model"]), row["system"], row.get("filler", "sentences"), Telling.of_row(row))
        require_alike(row, known.setdefault((series, row.get("seed")), {}))
        count = counts.setdefault(series, {}).setdefault(row["filler_tokens"], [0, 0])
        count[0] += bool(row["correct"])
        count[1] += 1
    return {
        series: [
            Accuracy(length, right, asked, *wilson_interval(right, asked))
            for length, (right, asked) in sorted(by_length.items())
        ]
        for series, by_length in sorted(counts.items())
    }
