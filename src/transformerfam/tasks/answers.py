"""Questions of one's own, in a JSON lines file: a text, a question, and the answers that count."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformerfam.errors import CorruptFileError, TransformerFamError
from transformerfam.fields import LARGEST_INTEGER
from transformerfam.files.reading import parse_json, refuse_endless
from transformerfam.tasks.answer_scores import SCORERS, SQUAD
from transformerfam.tasks.text import read_text

KEYS = (
    *("id", "text", "file", "passages", "question", "answers", "choices", "group"),
    *("prompt", "scorer", "max_new_tokens", "first_line", "depth"),
)
FORM = (
    'required is {"text" or "file": ..., "question": ..., "answers": [...]}, optional are id, choices, group, prompt, '
    "scorer, max_new_tokens, first_line and depth"
)
NO_TEXT = ""
"""The source of items that are asked without a text."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question."""

    name: str
    """Its `id`, or "line N"."""
    text: str | None
    """What it is asked about; None where `file` has it, empty where it is asked without a text."""
    file: Path | None
    source: str
    """Digest of the text: questions on one text are asked of one reading."""
    question: str
    answers: tuple[str, ...]
    """Those that count; none: the text does not say."""
    choices: tuple[str, ...] = ()
    """Those to choose from, by likelihood; without them the model answers in its own words."""
    group: str = ""
    prompt: str = ""
    """What is asked, word for word; empty: the question in the evaluation's template."""
    scorer: str = SQUAD
    """One of `SCORERS`."""
    max_new_tokens: int | None = None
    """Tokens of the answer at most; None: the evaluation's."""
    first_line: bool = True
    """Whether the answer ends with its line."""
    depth: float | None = None
    """The share of the text that comes before what the answer follows from."""

    def whole_text(self) -> str:
        """Return the text.

        Raises:
            TransformerFamError: its file cannot be read, is not UTF-8, or the text is empty.
        """
        if self.source == NO_TEXT:
            return ""
        text = read_text(str(self.file)) if self.text is None else self.text
        if not text.strip():
            raise TransformerFamError(f"{self.name}: its text is empty, required is one to ask about; give another")
        return text


class QuestionFile:
    """The items of a file, each read when it is needed: the file may be larger than memory.

    Args:
        path: JSON lines.

    Raises:
        TransformerFamError: the file cannot be read.
        CorruptFileError: a line is no item; the message has its number, what is wrong, and what to write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.digest = hashlib.sha256()  # of the lines and of the files that they name
        self.scorers: set[str] = set()  # of answers in the model's own words
        self._files: dict[Path, str] = {}  # digests
        self._texts: dict[str, list[tuple[int, int]]] = {}  # by source: where its items begin, and their line numbers
        names: dict[str, int] = {}
        for start, number, line in self._lines():
            self.digest.update(line)
            if not line.strip():
                continue
            item = self._item(line, number)
            if item.name in names:
                raise CorruptFileError(
                    f"{self.path}, line {number}: its id is {item.name!r}, as in line {names[item.name]}; give each "
                    "item its own"
                )
            names[item.name] = number
            self.digest.update(item.source.encode())
            self.scorers |= set() if item.choices else {item.scorer}
            self._texts.setdefault(item.source, []).append((start, number))
        if not names:
            raise CorruptFileError(f"{self.path} holds no item; {FORM}, one a line")

    def __len__(self) -> int:
        """Return the number of items."""
        return sum(map(len, self._texts.values()))

    def texts(self) -> list[list[tuple[int, int]]]:
        """Return where the items of each text are, for `items`; those without a text are the last."""
        return [self._texts[source] for source in sorted(self._texts, key=lambda source: source == NO_TEXT)]

    def items(self, places: Sequence[tuple[int, int]]) -> list[Item]:
        """Read items again.

        Args:
            places: of `texts`.

        Raises:
            CorruptFileError: the file has changed.
        """
        with self._open() as file:
            lines = [(file.seek(start), file.readline())[1] for start, _ in places]
        return [self._item(line, number) for line, (_, number) in zip(lines, places, strict=True)]

    def _open(self) -> Any:
        try:
            refuse_endless(self.path)
            return self.path.open("rb")
        except OSError as error:
            raise TransformerFamError(f"cannot read {str(self.path)!r}: {error.strerror}") from error

    def _source_of_file(self, path: Path) -> str:
        """Return the digest of a text's file, which is read once."""
        if path not in self._files:
            try:
                refuse_endless(path)
                with path.open("rb") as file:
                    self._files[path] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise TransformerFamError(f"cannot read {str(path)!r}: {error.strerror}") from error
        return self._files[path]

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        with self._open() as file:
            start = 0
            for number, line in enumerate(file, start=1):
                yield start, number, line
                start += len(line)

    def _item(self, line: bytes, number: int) -> Item:
        def wrong(what: str) -> CorruptFileError:
            return CorruptFileError(f"{self.path}, line {number}: {what}; {FORM}")

        try:
            values = parse_json(line)
        except UnicodeDecodeError as error:
            raise wrong(f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
        except ValueError as error:
            raise wrong(f"it is no JSON ({error})") from error
        if not isinstance(values, dict):
            raise wrong(f"it is {type(values).__name__}, not an object")
        if unknown := sorted(values.keys() - set(KEYS)):
            raise wrong(f"unknown key {unknown[0]!r}")
        return self._checked(values, number, wrong)

    def _checked(self, values: Mapping[str, Any], number: int, wrong: Any) -> Item:
        def words(name: str, value: Any) -> str:
            if not isinstance(value, str) or not value.strip():
                raise wrong(f"{name} is {json.dumps(value)[:60]}, not a text with a word")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise wrong(f"{name} has half a surrogate pair at {error.start}") from error
            return value

        def several(name: str) -> tuple[str, ...]:
            value = values.get(name, [])
            if not isinstance(value, list):
                raise wrong(f"{name} is {json.dumps(value)[:60]}, not a list")
            return tuple(words(f"one of {name}", one) for one in value)

        if "answers" not in values:
            raise wrong("it has no answers; [] says that the text does not have the answer")
        given = [name for name in ("text", "file", "passages") if name in values]
        if len(given) > 1:
            raise wrong(f"it has {' and '.join(given)}, not one of them")
        text = words("text", values["text"]) if "text" in values else None
        file = (self.path.parent / words("file", values["file"])).absolute() if "file" in values else None
        if "passages" in values:
            text = words("passages", _joined(values["passages"], wrong))
        if not given:
            text = ""
        answers, choices = several("answers"), several("choices")
        if choices and not set(answers) <= set(choices):
            raise wrong(f"answers are {list(answers)}, not among choices")
        if choices and (len(choices) < 2 or len(set(choices)) < len(choices) or not answers):
            raise wrong(f"choices are {list(choices)}, not two or more different ones with an answer among them")
        return Item(
            name=words("id", values["id"]) if "id" in values else f"line {number}",
            text=text,
            file=file,
            source=self._source_of_file(file) if file is not None else _digest(text) if text else NO_TEXT,
            question=words("question", values.get("question")),
            answers=answers,
            choices=choices,
            group=words("group", values["group"]) if "group" in values else "",
            prompt=words("prompt", values["prompt"]) if "prompt" in values else "",
            **_fields_of_answer(values, wrong),
        )


def _fields_of_answer(values: Mapping[str, Any], wrong: Any) -> dict[str, Any]:
    """Return the fields of an item that say how its answer is taken and scored, checked."""
    scorer, number, depth = values.get("scorer", SQUAD), values.get("max_new_tokens"), values.get("depth")
    if not isinstance(scorer, str) or scorer not in SCORERS:
        raise wrong(f"scorer is {json.dumps(scorer)[:60]}, not one of {', '.join(SCORERS)}")
    if scorer != SQUAD and (values.get("choices") or not values["answers"]):
        raise wrong(f"scorer is {scorer!r}, which compares an answer in the model's own words with one that counts")
    if number is not None and not (type(number) is int and 1 <= number <= LARGEST_INTEGER):
        raise wrong(f"max_new_tokens is {json.dumps(number)[:60]}, not a whole number from 1")
    if depth is not None and not (type(depth) in (int, float) and 0 <= depth <= 1):
        raise wrong(f"depth is {json.dumps(depth)[:60]}, not a number from 0 to 1")
    first_line = values.get("first_line", "prompt" not in values)
    if not isinstance(first_line, bool):
        raise wrong(f"first_line is {json.dumps(first_line)[:60]}, not true or false")
    return {"scorer": scorer, "max_new_tokens": number, "first_line": first_line, "depth": depth}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _joined(passages: Any, wrong: Any) -> str:
    """Return passages as one text, as `fam data fetch questions` writes them."""
    try:
        text = "\n\n".join(f"{passage['title']}\n{passage['text']}" for passage in passages)
    except (TypeError, KeyError) as error:
        raise wrong(f'passages are not a list of {{"title": ..., "text": ...}} ({error})') from error
    if not text.strip():
        raise wrong("passages are empty")
    return text
