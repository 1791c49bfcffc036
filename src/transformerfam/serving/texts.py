"""Texts that arrive: kept in a file while they come, tokenised at the pace at which they are read."""

import collections
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from transformerfam.errors import TransformerFamError
from transformerfam.tasks.text import READ_BYTES, decode_utf8, stream_token_ids
from transformerfam.tasks.unknown_words import require_known, unknown_share

MOST_AHEAD = 1 << 16
"""Tokens that are made before they are read."""
PIECE_CHARS = 4096


class SharedTokenizer:
    """A tokenizer that several threads use, one call at a time: those of tokenizers change it.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenise, as the tokenizer does."""
        with self._lock:
            return self._tokenizer(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Return the text of token ids."""
        with self._lock:
            return self._tokenizer.decode(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Spool:
    """A text on its way: a temporary file that is written at its end and read from its beginning.

    Attributes:
        num_bytes: bytes written.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._condition = threading.Condition()
        self._is_complete = False
        self._error: BaseException | None = None
        self.num_bytes = 0

    @classmethod
    def of(cls, content: bytes) -> "Spool":
        """Return the spool of a whole text."""
        spool = cls()
        spool.write(content)
        spool.end()
        return spool

    def write(self, content: bytes) -> None:
        """Add bytes.

        Raises:
            OSError: the disk is full.
        """
        with self._condition:
            self._file.seek(0, 2)
            self._file.write(content)
            self._file.flush()
            self.num_bytes += len(content)
            self._condition.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Note that the text is whole, or that it never will be."""
        with self._condition:
            self._is_complete, self._error = True, self._error or error
            self._condition.notify_all()

    def close(self) -> None:
        """Remove the file; whoever reads it gets an error."""
        with self._condition:
            self.end(TransformerFamError("the text was removed while it was read"))
            self._file.close()

    def pieces(self, waits: bool = True) -> Iterator[bytes]:
        """Yield the text from its beginning, as it arrives.

        Args:
            waits: wait for what has not arrived; else end there.
        """
        place = 0
        while True:
            with self._condition:
                while waits and self._error is None and place >= self.num_bytes and not self._is_complete:
                    self._condition.wait()
                if self._error is not None:
                    raise self._error
                self._file.seek(place)
                piece = self._file.read(READ_BYTES)
            if not piece:
                return
            place += len(piece)
            yield piece


class TokenFeed:
    """The token ids of a spool, made in a thread at most `MOST_AHEAD` ahead: a `TokenSource`.

    Args:
        spool: the text.
        tokenizer: of the model, shared.
        begins: whether the text begins a reading.
        allow_unknown: read a text of which the tokenizer knows next to no word, too.
        num_taken: tokens that were taken before, and are left out.

    Attributes:
        num_taken: tokens that were taken so far.
        num_unknown: tokens that are words the tokenizer does not know.
    """

    def __init__(
        self, spool: Spool, tokenizer: Any, *, begins: bool, allow_unknown: bool = False, num_taken: int = 0
    ) -> None:
        self.spool = spool
        self.num_taken = num_taken
        self._num_left_out = num_taken
        self.tokenizer = tokenizer
        self.begins = begins
        self.allow_unknown = allow_unknown
        self.num_unknown = 0
        self._ids: collections.deque[int] = collections.deque()
        self._condition = threading.Condition()
        self._is_complete = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="token feed", daemon=True)
        self._thread.start()

    def take(self, num_tokens: int) -> list[int] | None:
        """Return at most so many ids; see `TokenSource`."""
        with self._condition:
            if self._error is not None:
                raise self._error
            if not self._ids:
                return None if self._is_complete else []
            ids = [self._ids.popleft() for _ in range(min(num_tokens, len(self._ids)))]
            self.num_taken += len(ids)
            self._condition.notify_all()
        return ids

    def close(self) -> None:
        """End the thread and remove the text."""
        with self._condition:
            self._is_complete = True
            self._condition.notify_all()
        self.spool.close()

    def _run(self) -> None:
        try:
            texts = decode_utf8(self.spool.pieces(), "the text")
            num_seen = 0
            for ids in stream_token_ids(texts, self.tokenizer, PIECE_CHARS, begins=self.begins):
                self._look_at(ids, is_first=num_seen == 0)
                first = max(0, self._num_left_out - num_seen)
                num_seen += len(ids)
                with self._condition:
                    while len(self._ids) >= MOST_AHEAD and not self._is_complete:
                        self._condition.wait()
                    if self._is_complete:
                        return
                    self._ids += ids[first:]
            if num_seen < self._num_left_out:
                raise TransformerFamError(
                    f"the text has {num_seen} tokens, of which {self._num_left_out} were read before, by another "
                    "tokenizer; send it again as a new memory"
                )
            if not num_seen:
                raise TransformerFamError("the text is empty, at least one token is required; send a text")
        except Exception as error:
            with self._condition:
                self._error = error
        finally:
            with self._condition:
                self._is_complete = True

    def _look_at(self, ids: list[int], is_first: bool) -> None:
        share = unknown_share(self.tokenizer, ids[1:] if is_first else ids)
        self.num_unknown += round(share * len(ids))
        if is_first and not self.allow_unknown:
            require_known(share, "the text", "send allow_unknown = true")
