"""Read text of any length into a state, in constant memory, so that an interrupted reading can be resumed."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from transformerfam.decoder.generation import read_last_tokens
from transformerfam.errors import ReadInterrupted, TransformerFamError
from transformerfam.fam.state import FamState
from transformerfam.files.tensors import require_target
from transformerfam.tasks.ragged import greedy_tokens
from transformerfam.tasks.text import encode, encode_rest, encode_start, end_ids, stream_text, stream_token_ids
from transformerfam.tasks.unknown_words import known_pieces, say_unknown


def read_text_stream(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    state: FamState | None = None,
    *,
    skip_tokens: int = 0,
    progress: Callable[[int, FamState], None] | None = None,
    allow_unknown: bool = False,
) -> FamState:
    """Read pieces of text, which may end anywhere, into one state.

    A state that has read nothing else begins with the special tokens that the tokenizer begins texts with.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        texts: pieces of text, in order.
        state: reading to continue, in place; None starts one.
        skip_tokens: tokens at the beginning of the text that the state has read already.
        progress: called after every block with the tokens done, skipped ones included, and the state.
        allow_unknown: read a text of which the tokenizer knows next to no word, too.

    Returns:
        The state.

    Whatever ends the reading, `state` then holds whole pieces, and its `num_tokens_read` says how many tokens.

    Raises:
        TransformerFamError: there is no token to read, or the text's first tokens are mostly unknown words.
        ReadInterrupted: Ctrl-C; it carries the state and the tokens of this text that are done.

    Warns:
        UserWarning: some tokens are unknown words; it gives their share.
    """
    with torch.no_grad():
        state = model.init_state() if state is None else state
    num_read_before = state.num_tokens_read
    begins = num_read_before == skip_tokens  # else the state has read something in front of this text
    remedy = "allow unknown words (allow_unknown, --allow-unknown)"
    pieces = stream_token_ids(texts, tokenizer, begins=begins)
    pieces = known_pieces(pieces, tokenizer, "the text", remedy, allow_unknown=allow_unknown)
    whole: FamState | None = state.fork()  # in front of the block that is read, which an error may break off

    def move(done: int, _: Any, moved: FamState) -> None:
        nonlocal whole
        whole = None  # so that there are two states at most
        whole = moved.fork()
        if progress is not None:
            progress(skip_tokens + done, moved)

    try:
        rest = _behind(pieces, skip_tokens)
        model.read(itertools.chain([next(rest)], rest), state, progress=move)
    except KeyboardInterrupt as error:
        raise ReadInterrupted(state, skip_tokens + state.num_tokens_read - num_read_before) from error
    except Exception:
        if whole is not None:
            state.go_on_from(whole)
        raise
    return state


def _behind(pieces: Iterable[list[int]], num_tokens: int) -> Iterator[list[int]]:
    """Yield the ids after so many.

    Raises:
        TransformerFamError: there are none.
    """
    num_seen = 0
    for ids in pieces:
        rest = ids[max(0, num_tokens - num_seen) :]
        num_seen += len(ids)
        if rest:
            yield rest
    if num_seen <= num_tokens:
        raise TransformerFamError(
            f"the text has {num_seen} tokens and {num_tokens} of them are skipped, at least 1 is required to read; "
            "give a longer text"
        )


def save_somewhere(state: FamState, path: Path, overwrite: bool = False) -> tuple[Path, TransformerFamError | None]:
    """Save a reading, in another folder if its own does not take it.

    Args:
        state: the reading.
        path: where it should go.
        overwrite: replace a state that is there; another process may have put it there meanwhile.

    Returns:
        Where it is, and why it is elsewhere; None if it is not.

    Raises:
        TransformerFamError: no folder takes it.
    """
    try:
        require_target(path, "state", overwrite)
        state.save(path)
        return path, None
    except TransformerFamError as error:
        for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
            with contextlib.suppress(TransformerFamError, OSError):
                other = Path(tempfile.mkdtemp(prefix="reading-", dir=folder)) / path.name
                state.save(other)
                return other, error
        raise


def count_tokens(path: str | Path, tokenizer: Any, begins: bool = True) -> int:
    """Return the number of tokens in a UTF-8 file, or in all files of a folder, read from the beginning or after more.

    Raises:
        TransformerFamError: a file cannot be read, or is not UTF-8.
    """
    return sum(map(len, stream_token_ids(stream_text(path), tokenizer, begins=begins)))


def question_ids(tokenizer: Any, question: str, state: FamState, chat: bool = False) -> list[int]:
    """Return the tokens of a question that follows what a state has read.

    Args:
        tokenizer: of the model.
        question: text that follows what the state has read.
        state: a reading of one sequence.
        chat: put the question as a user does, in the tokenizer's chat template.

    Raises:
        TransformerFamError: the question is empty, or there is no chat template, or one that fails.

    Warns:
        UserWarning: some tokens of the question are unknown words; it gives their share.
    """
    if not encode(tokenizer, question):
        raise TransformerFamError("the question is empty, at least one token is required; give a question")
    if chat:
        if not tokenizer.chat_template:
            raise TransformerFamError("the tokenizer has no chat template; ask without --chat")
        asked = [{"role": "user", "content": question}]
        try:
            question = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template leads to
            raise TransformerFamError(
                f"the tokenizer's chat template fails ({type(error).__name__}: {error}); ask without --chat"
            ) from error
    ids = (encode_rest if state.num_tokens_read else encode_start)(tokenizer, question)
    say_unknown(tokenizer, encode_rest(tokenizer, question), "the question")
    return ids


@torch.no_grad()
def generate_text(
    model: Any, tokenizer: Any, question: str, state: FamState, max_new_tokens: int, chat: bool = False
) -> str:
    """Return the likeliest continuation of what was read and `question`; the state advances.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        question: text that follows what the state has read.
        state: a reading of one sequence.
        max_new_tokens: tokens at most; an end-of-text token ends it earlier.
        chat: put the question as a user does, in the tokenizer's chat template.

    Raises:
        TransformerFamError: see `question_ids`.
    """
    ids = question_ids(tokenizer, question, state, chat)
    ends = end_ids(tokenizer, model.generation_config.eos_token_id)
    read_last_tokens(model, state)
    answer_1T = greedy_tokens(model, torch.tensor([ids]), state, max_new_tokens, end_ids=ends)
    state.unread_ids = answer_1T[:, -1].tolist()
    return str(tokenizer.decode(answer_1T[0], skip_special_tokens=True)).strip()
