"""Text of any length as token ids: UTF-8 decoded and tokenised piece by piece."""

import codecs
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from transformerfam.errors import RecipeError, TransformerFamError
from transformerfam.files.reading import refuse_endless
from transformerfam.tasks.novels import HELD_OUT_NOVELS, open_novel

READ_BYTES = 1 << 16
STANDARD_INPUT = "-"
TEXT_SUFFIX = ".txt"
START_PROBES = ("a", "The sun", "the", "1", "0 1 2", ". ?", "x y z", "是的", "да", "ABC", "\n")
"""Texts by which special tokens in front are found: some tokenizers have no token for one, or a special one."""


def read_text(path: str | Path) -> str:
    """Return a UTF-8 file, or a novel of the package by its name, as one string.

    Raises:
        TransformerFamError: the file cannot be read, or is not UTF-8.
    """
    with open_bytes(path) as file:
        return "".join(decode_utf8(read_pieces(file), str(path)))


def list_files(path: str | Path) -> list[Path | str]:
    """Return a file, a novel's name, or all files of a folder and its folders by name, without hidden ones.

    Raises:
        TransformerFamError: there is no such file, it cannot be opened, or the folder holds none.
    """
    if not str(path):
        raise TransformerFamError("the path is empty, required is a UTF-8 text, a folder of them, or - (stdin)")
    if not Path(path).is_dir():
        open_bytes(path).close()
        return [path]
    files: list[Path | str] = sorted(_files_in(Path(path), set()))
    if not files:
        raise TransformerFamError(
            f"{str(path)!r} holds no file, required is at least one UTF-8 text; give another folder"
        )
    return files


def files_of(names: Sequence[str], key: str) -> list[Path]:
    """Return files, those of a folder by name, without hidden ones.

    Args:
        names: files and folders.
        key: of the recipe that has them, for messages.

    Raises:
        RecipeError: a folder holds no `.txt` file, or a file is named twice.
    """
    files: list[Path] = []
    for name in names:
        found = [Path(name)]
        if not name or Path(name).is_dir():
            try:
                found = [path for path in map(Path, list_files(name)) if path.suffix.lower() == TEXT_SUFFIX]
            except TransformerFamError as error:
                raise RecipeError(f"{key}: {error}") from error
            if not found:
                raise RecipeError(f"{key}: {name!r} holds no {TEXT_SUFFIX} file; name another folder")
        files += found
    for path, number in Counter(path.resolve() for path in files).items():
        if number > 1:
            raise RecipeError(f"{key}: {path} is named {number} times, required is once; leave one out")
    return files


def _files_in(folder: Path, above: set[Path]) -> Iterator[Path]:
    """Yield the files of a folder and its folders, those that are links, too, without hidden ones.

    Args:
        folder: where to look.
        above: the folders that it is in, links resolved.

    Raises:
        TransformerFamError: a link leads nowhere or back up, or something is no file.
    """
    own = folder.resolve()
    if own in above:
        raise TransformerFamError(f"{folder} is a link to a folder that it is in, and has no end; remove it")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_in(path, above | {own})
        elif path.is_file():
            yield path
        else:
            what = "is a link that leads nowhere" if path.is_symlink() else "is not a file"
            raise TransformerFamError(f"{path} {what}, and a folder is read whole; remove it")


def is_read_once(path: str | Path) -> bool:
    """Return whether a text cannot be opened a second time: standard input, or a pipe as `<(command)` of a shell."""
    if str(path) == STANDARD_INPUT:
        return True
    try:
        return not stat.S_ISREG(mode := Path(path).stat().st_mode) and not stat.S_ISDIR(mode)
    except (OSError, ValueError):  # no such file, which opening it says
        return False


def stream_text(path: str | Path) -> Iterator[str]:
    """Yield the text of a file, or of all files of a folder with an empty line between two of them, piece by piece.

    "-" is standard input.

    Raises:
        TransformerFamError: a file cannot be read, or is not UTF-8; the message names it.
    """
    if str(path) == STANDARD_INPUT:
        if sys.stdin is None:
            raise TransformerFamError("standard input is closed; give a file, or a text on standard input")
        yield from decode_utf8(read_pieces(sys.stdin.buffer), "standard input")
        return
    for number, file in enumerate(list_files(path)):
        if number:
            yield "\n\n"
        with open_bytes(file) as opened:
            yield from decode_utf8(read_pieces(opened), str(file))


def open_bytes(path: str | Path) -> IO[bytes]:
    """Open a file, or a novel of the package by its name ("persuasion", "northanger_abbey"), for reading bytes.

    Raises:
        TransformerFamError: there is no such file, or it cannot be opened.
    """
    if str(path) in HELD_OUT_NOVELS:
        return open_novel(str(path))
    try:
        refuse_endless(path)
        return Path(path).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise TransformerFamError(
            f"cannot read {str(path)!r} ({reason}); a readable UTF-8 text file is required, check the path, or "
            f"take a novel of the package: {', '.join(HELD_OUT_NOVELS)}"
        ) from error


def read_pieces(file: IO[bytes], num_bytes: int = READ_BYTES) -> Iterator[bytes]:
    """Yield what `file` holds, as it comes, in pieces of at most `num_bytes` bytes.

    Raises:
        TransformerFamError: it cannot be read to its end.
    """
    read = getattr(file, "read1", file.read)  # a pipe gives what is there instead of waiting for a full piece
    try:
        while piece := read(num_bytes):
            yield piece
    except OSError as error:
        name = getattr(file, "name", "the text")
        raise TransformerFamError(f"cannot read {name} to its end ({error.strerror}); check it, and resume") from error


def decode_utf8(pieces: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode pieces of UTF-8 that may cut a character anywhere; all that precedes a wrong byte is yielded.

    Args:
        pieces: bytes, in order.
        name: where they come from, for the error.

    A byte order mark at the beginning is not part of the text.

    Raises:
        TransformerFamError: the bytes are not UTF-8; the message gives the position of the first wrong byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    num_decoded = 0  # bytes that earlier calls took
    for piece, is_last in _mark_last(pieces):
        try:
            text = decoder.decode(piece, final=is_last)
        except UnicodeDecodeError as error:
            position = num_decoded + len(piece) - len(error.object) + error.start
            yield error.object[: error.start].decode("utf-8-sig")
            raise TransformerFamError(
                f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {position} ({error.reason}); "
                "UTF-8 text is required, convert it first, for example with iconv -t UTF-8"
            ) from error
        num_decoded += len(piece)
        if text:
            yield text


def _mark_last(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for piece in pieces:
        yield piece, False
    yield b"", True


def stream_token_ids(
    texts: Iterable[str], tokenizer: Any, piece_chars: int = 16_384, *, begins: bool = False
) -> Iterator[list[int]]:
    """Tokenise text of any length in constant memory, with the ids that the whole text would give.

    Pieces end between two words, where tokenizers do not join. One that joins over spaces, or a text without a space
    in `piece_chars` characters, may give other ids at such a place. Where `texts` ends with an error, all whole words
    that came before it are yielded first: their ids are those that the whole text would give.

    Args:
        texts: pieces of text that may end anywhere.
        tokenizer: a Hugging Face tokenizer.
        piece_chars: characters that are gathered before they are tokenised.
        begins: whether the text begins here, with the special tokens that the tokenizer begins texts with; else it
            follows what was read before.
    """
    drop_space = _joins_space_in_front(tokenizer)
    buffer = ""
    encoded: Callable[[Any, str], list[int]] = encode_start if begins else encode_rest  # of the first piece
    try:
        for text in texts:
            buffer += text
            while len(buffer) > piece_chars:
                cut = _last_cut(buffer[: piece_chars + 1])
                yield encoded(tokenizer, buffer[:cut])
                encoded = encode
                buffer = buffer[cut + (drop_space and buffer[cut : cut + 1] == " ") :]
    except (Exception, KeyboardInterrupt):
        if (cut := _last_cut(buffer)) > 0:
            yield encoded(tokenizer, buffer[:cut])
        raise
    if buffer:
        yield encoded(tokenizer, buffer)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` alone, without special tokens.

    Raises:
        TransformerFamError: the text has halves of characters, as arguments have that are not UTF-8; or the tokenizer
            is set wrongly.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except (TypeError, UnicodeEncodeError) as error:
        halves = [place for place, character in enumerate(text) if "\ud800" <= character <= "\udfff"]
        if not halves:
            raise TransformerFamError(
                f"the tokenizer cannot take a text ({error}); look for a value of another type in its "
                "tokenizer_config.json"
            ) from error
        raise TransformerFamError(
            f"the text {text[:60]!r} is not UTF-8 at character {halves[0]}; give it as UTF-8"
        ) from error


def start_ids(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer begins a text with, before the text's own; often none.

    A text begins with them, a continuation of what was read does not.
    """
    possible: set[tuple[int, ...]] = set()
    for text in START_PROBES:
        own, whole = encode(tokenizer, text), list(tokenizer(text, verbose=False)["input_ids"])
        places = range(len(whole) - len(own) + 1) if own else ()
        found = {tuple(whole[:place]) for place in places if whole[place : place + len(own)] == own}
        possible = possible & found or possible or found
        if len(possible) == 1:
            break
    else:
        # No probe has tokens that differ from special ones: what an empty text has is before it, or after it.
        bos, whole = getattr(tokenizer, "bos_token_id", None), list(tokenizer("", verbose=False)["input_ids"])
        possible = possible or ({(bos,)} if bos is not None and whole[:1] == [bos] else set())
    longest: tuple[int, ...] = max(possible, key=len, default=())
    return list(longest)


def encode_start(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text from its beginning on, with the special tokens in front, unless it has them."""
    ids, start = encode(tokenizer, text), start_ids(tokenizer)
    return ids if _has_start(tokenizer, text, ids, start) else start + ids


def encode_rest(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that follows what was read, without special tokens in front, as templates have."""
    ids, start = encode(tokenizer, text), start_ids(tokenizer)
    return ids[len(start) :] if _has_start(tokenizer, text, ids, start) else ids


def _has_start(tokenizer: Any, text: str, ids: list[int], start: list[int]) -> bool:
    """Return whether a text has the special tokens in front itself; an unknown word may have the same token as they."""
    return ids[: len(start)] == start and text.startswith(str(tokenizer.decode(start[:1])) if start else "")


def _last_cut(text: str) -> int:
    """Return the place of the last single space between two words, else the length of `text` less one."""
    end = len(text) - 1
    while (cut := text.rfind(" ", 1, end)) > 0:
        if not text[cut - 1].isspace() and not text[cut + 1].isspace():
            return cut
        end = cut
    return len(text) - 1


def _joins_space_in_front(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts its own space in front of a text, so that a piece must not bring one."""
    return encode(tokenizer, "the sun") != encode(tokenizer, "the") + encode(tokenizer, " sun")


def end_ids(tokenizer: Any, of_model: int | Sequence[int] | None) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, and the model's own.

    Args:
        tokenizer: of the model.
        of_model: its `eos_token_id`, one, several or None.
    """
    own = [of_model] if of_model is None or isinstance(of_model, int) else of_model
    return {token for token in (tokenizer.eos_token_id, *own) if token is not None}
