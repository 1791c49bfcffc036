"""How a study begins or resumes: the text checked and read, and what is there compared with it."""

import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from transformerfam.decoder.state import ReadingState, history_of
from transformerfam.errors import ReadInterrupted, StateMismatchError, TransformerFamError
from transformerfam.fam.memory import memory_of
from transformerfam.fam.state import FamState
from transformerfam.study.checkpoint import StudyFiles
from transformerfam.study.document import require_sentences
from transformerfam.study.lessons import LessonMaker
from transformerfam.study.options import StudyOptions
from transformerfam.study.study import Study
from transformerfam.tasks.text import stream_text, stream_token_ids
from transformerfam.tasks.unknown_words import known_pieces

ReadProgress = Callable[[int, int | None, ReadingState], None]
"""Of (tokens read, tokens to be read, state)."""


def text_ids(text: str, tokenizer: Any, name: str, allow_unknown: bool = False) -> list[int]:
    """Return the token ids of a text from its beginning on, as `fam read` reads them.

    Raises:
        TransformerFamError: the text has no sentence, or its first tokens are mostly unknown words.

    Warns:
        UserWarning: some tokens are unknown words.
    """
    require_sentences(text, name)
    remedy = "allow unknown words (allow_unknown, --allow-unknown)"
    pieces = stream_token_ids([text], tokenizer, begins=True)
    return list(chain.from_iterable(known_pieces(pieces, tokenizer, name, remedy, allow_unknown=allow_unknown)))


def begin_study(
    model: Any,
    tokenizer: Any,
    file: str,
    options: StudyOptions,
    files: StudyFiles,
    *,
    resume: bool = False,
    allow_unknown: bool = False,
    on_read: ReadProgress | None = None,
) -> Study:
    """Read a text, or take up the reading that is there, and return the study of it.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        file: a UTF-8 file, or a folder of them.
        options: what the study is made with.
        files: where it is kept.
        resume: continue the reading, or the study, that is there.
        allow_unknown: read a text of which the tokenizer knows next to no word, too.
        on_read: called after every block of the reading.

    Raises:
        TransformerFamError: the text or an option does not serve, there is nothing to resume, or what is there is of
            another text or of other options.
        StateMismatchError: what is there is of another model.
        CorruptFileError: what is there is damaged.
        ReadInterrupted: Ctrl-C while reading; what was read is kept, and `resume` continues it.
    """
    config = memory_of(model).config
    if not config.fam_length:
        raise TransformerFamError("the model has no rows to study with (fam_length is 0); take one with a memory")
    ids = text_ids("".join(stream_text(file)), tokenizer, file, allow_unknown)
    num_whole = len(ids) // config.block_size * config.block_size
    if not num_whole:
        raise TransformerFamError(
            f"{file} has {len(ids)} tokens, required are at least those of a block, {config.block_size}: rows hold "
            "whole blocks; give a longer text, or read it with `fam read`"
        )
    LessonMaker.require_room(config, tokenizer, options.piece_tokens, options.answer_tokens)
    if resume and not files.reading.exists():
        raise TransformerFamError(f"there is no study to resume: {files.reading} is missing; start without --resume")
    reading = _resumed_reading(model, ids, files) if resume else model.init_state().detach()
    if reading.num_tokens_read < num_whole:
        _read(model, ids[:num_whole], reading, files, on_read)
        reading.save(files.reading)
    return Study(model, tokenizer, reading, ids, options, files, resume=resume and files.checkpoint.exists())


def _resumed_reading(model: Any, ids: list[int], files: StudyFiles) -> FamState:
    """Return the reading that is there.

    Raises:
        StateMismatchError: it is of another text, model or weights.
        CorruptFileError: it is damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # other weights, which a plain reading may continue with
        try:
            reading = FamState.load(files.reading, model, batch_size=1)
        except UserWarning as warning:
            raise StateMismatchError(
                f"{warning}; a study is resumed with the model that it was begun with, or started over with --overwrite"
            ) from warning
    num_read = reading.num_tokens_read
    if num_read > len(ids) or reading.histories != [history_of(ids[:num_read])]:
        raise StateMismatchError(
            f"{files.reading} is a reading of another text; resume the study with the text that it was begun with, or "
            "start over with --overwrite"
        )
    return reading


def _read(model: Any, ids: list[int], reading: FamState, files: StudyFiles, on_read: ReadProgress | None) -> None:
    """Read on to the end of `ids`; what was read is kept whatever ends it."""
    num_before = reading.num_tokens_read

    def move(done: int, _: Any, state: ReadingState) -> None:
        if on_read is not None:
            on_read(num_before + done, len(ids), state)

    try:
        model.read(torch.tensor(ids[num_before:]), reading, progress=move)
    except ReadInterrupted:
        reading.save(files.reading)
        raise
