"""What RULER's texts are made of, each loaded when a task needs it: words, essays, documents."""

import itertools
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformerfam.errors import MissingPackageError
from transformerfam.files.reading import parse_json, read_whole, required_form
from transformerfam.sources.registry import SOURCES
from transformerfam.sources.ruler import ESSAYS
from transformerfam.sources.source import find_source
from transformerfam.tasks.haystack import Haystack


@dataclass(frozen=True)
class Documents:
    """Documents, and questions on them.

    Attributes:
        documents: their texts.
        questions: each with its question, its answers, the numbers of the documents that it needs, and of those that
            are put next to them first.
    """

    documents: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]], ...]


class Parts:
    """What texts are made of.

    Args:
        folder: where `fam data fetch ruler` put them; None: `cache_folder()`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @cached_property
    def essays(self) -> Haystack:
        """The essays of Paul Graham, which repeat as they are."""
        return Haystack(read_whole(self._file(ESSAYS)).decode(), "essays", is_shuffled=False)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """English words by kind: noun, adjective, verb.

        Raises:
            MissingPackageError: wonderwords is not installed.
        """
        try:
            from wonderwords import RandomWord
        except ImportError as error:
            raise MissingPackageError('wonderwords has RULER\'s words; pip install "transformerfam[data]"') from error
        own = RandomWord()
        return {kind: sorted(set(own.filter(include_categories=[kind]))) for kind in ("noun", "adjective", "verb")}

    def documents(self, name: str) -> Documents:
        """Return documents, "squad" or "hotpotqa".

        Raises:
            TransformerFamError: they were not fetched.
            CorruptFileError: the file has another form.
        """
        path = self._file(f"{name}.json")
        with required_form(f"{path} has another form", "remove its folder and run fam data fetch ruler"):
            values = parse_json(read_whole(path))
            questions = tuple(
                (str(one["question"]), tuple(one["answers"]), tuple(one["needed"]), tuple(one["related"]))
                for one in values["questions"]
            )
            return Documents(tuple(values["documents"]), questions)

    def _file(self, name: str) -> Path:
        return find_source(SOURCES["ruler"], self._folder).folder / "test" / name

    def different(self, kind: str, draw: random.Random, known: set[str]) -> str:
        """Draw a key or a value that is not among those known, and note it there.

        Args:
            kind: "words", "numbers" or "uuids".
            draw: source of chance.
            known: what was drawn already.
        """
        drawers: dict[str, Callable[[], str]] = {
            "words": lambda: f"{draw.choice(self.words['adjective'])}-{draw.choice(self.words['noun'])}",
            "numbers": lambda: str(draw.randint(10**6, 10**7 - 1)),
            "uuids": lambda: str(uuid.UUID(int=draw.getrandbits(128), version=4)),
        }
        return _other(drawers[kind], known)


def letters(count: int, length: int, draw: random.Random, upper: bool) -> list[str]:
    """Draw different words of random letters."""
    known: set[str] = set()
    alphabet = string.ascii_uppercase if upper else string.ascii_lowercase
    return [_other(lambda: "".join(draw.choices(alphabet, k=length)), known) for _ in range(count)]


def _other(draw: Callable[[], str], known: set[str]) -> str:
    found = next(found for _ in itertools.count() if (found := draw()) not in known)
    known.add(found)
    return found
