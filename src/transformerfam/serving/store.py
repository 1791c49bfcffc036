"""States and records at an fsspec address: a folder, S3, Redis or another, by the packages that serve them.

    OWNER/MEMORY/record.json            which state is the memory's, and all that is said of it
    OWNER/MEMORY/state-....safetensors  one version of its state
    OWNER/MEMORY/text-....txt           texts that are not read yet, or are kept
    OWNER/key-...                       which memory a request with an idempotency key made; of shared stores alone

A new version gets a new name, and the record that names it takes the old one's place in one step. So whenever the
process is killed, the record names a whole state, the old or the new one; what no record names is removed at the next
start, or where several servers share the store within a minute.
"""

import contextlib
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformerfam.errors import MissingPackageError, TransformerFamError
from transformerfam.files.locks import hold, hold_shared
from transformerfam.files.writing import make_folder, replacing, write_bytes
from transformerfam.serving.errors import ApiError
from transformerfam.serving.texts import Spool

RECORD = "record.json"
OWNER = r"[0-9a-f]{16}"
MEMORY = r"mem_[0-9a-f]{24}"
PART = r"(state|text)-[0-9a-f]{16}\.(safetensors|txt)"
TAG = ("ETag", "ino", "mtime", "created", "LastModified", "size")
"""By what a listing shows that a file is another than before, as far as the kind of store says it."""
TEMPORARY = r"\.tmp\w+|\.(record\.json|(state|text)-[0-9a-f]{16}\.(safetensors|txt))\.[0-9a-f]{8}"
"""Files that a killed process leaves: this package's, and those of safetensors (`.tmp...`)."""
OWN_FILES = f"{PART}|{TEMPORARY}|{re.escape(RECORD)}"


class Store:
    """Keep files of memories.

    Args:
        url: a folder, or another address that fsspec knows ("s3://bucket/path", "memory://x").
        is_shared: whether other servers use it, too, that all say so.

    Raises:
        TransformerFamError: there is no such kind of address, it cannot be reached, or another server has the folder.
        MissingPackageError: fsspec, or what serves the address, is not installed.
    """

    def __init__(self, url: str, is_shared: bool = False) -> None:
        self.url = url
        try:
            import fsspec
        except ImportError as error:
            raise MissingPackageError('fsspec is not installed; pip install "transformerfam[serve]"') from error
        try:
            self.files, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise MissingPackageError(f"the store {url!r} needs a package that is not installed ({error})") from error
        except ValueError as error:
            raise TransformerFamError(f"the store is {url!r} ({error}); give a folder, or s3://BUCKET/PATH") from error
        self.is_local = "file" in (self.files.protocol if isinstance(self.files.protocol, tuple) else ())
        self._release: Callable[[], Any] = lambda: None
        if self.is_local:
            make_folder(self.root)
            lock, what = f"{self.root}/.lock", f"the store {self.root}"
            self._release = hold_shared(lock, what).close if is_shared else hold(lock, what).release

    def close(self) -> None:
        """Let another server have the folder."""
        self._release()

    def path(self, *parts: str) -> str:
        """Return the address of a file."""
        return "/".join((self.root.rstrip("/"), *parts))

    # Records

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield every memory's record, and remove what no record names.

        Raises:
            ApiError: 503, the store cannot be reached.
        """
        with self._reached("read"):
            for owner in self._names(self.root, OWNER):
                for memory in self._names(self.path(owner), MEMORY):
                    if record := self.clean(owner, memory):
                        yield record

    def clean(self, owner: str, memory: str) -> dict[str, Any]:
        """Remove what a memory's record does not name, and return the record; {}: there is none, and nothing is left.

        Nobody may change the memory meanwhile. Errors as `records`.
        """
        with self._reached("clean"):
            record = self.record(owner, memory)
            kept = {RECORD, *record.get("files", [])} if record else set()
            for name in self._names(self.path(owner, memory), OWN_FILES):
                if name not in kept:
                    self._remove(owner, memory, name)
            if not record:
                self._remove_folder(owner, memory)
        return record

    def listing(self, owner: str | None = None) -> list[tuple[str, str, dict[str, Any]]]:
        """Return owner and id of every memory, or of those of one owner, and what a listing shows of its files by name.

        Errors as `records`.
        """
        found: dict[tuple[str, str], dict[str, Any]] = {}
        folder = self.root.rstrip("/") if owner is None else self.path(owner)
        with self._reached("read"):
            if not self.files.exists(folder):
                return []
            for path, shown in self.files.find(folder, detail=True).items():
                parts = str(path).split("/")[-3:]
                if len(parts) == 3 and all(map(re.fullmatch, (OWNER, MEMORY, OWN_FILES), parts)):
                    tag = tuple(str(shown.get(field)) for field in TAG)
                    found.setdefault((parts[0], parts[1]), {})[parts[2]] = tag
        return [(*who, files) for who, files in sorted(found.items())]

    def record(self, owner: str, memory: str) -> dict[str, Any]:
        """Return a memory's record; {}: there is none. Errors as `records`, and 500 where it is damaged."""
        if not re.fullmatch(MEMORY, memory):
            return {}
        path = self.path(owner, memory, RECORD)
        try:
            content = b"{}"
            with self._reached("read"), contextlib.suppress(FileNotFoundError):
                content = self.files.cat_file(path)
            record = json.loads(content)
            return record if isinstance(record, dict) and isinstance(record.get("files"), list) else {}
        except ValueError as error:
            raise ApiError(
                500,
                f"the record {path} is damaged ({error}); restore it, or remove its folder and read the text again",
                "record_damaged",
            ) from error

    def put_record(self, owner: str, memory: str, record: dict[str, Any]) -> None:
        """Write a memory's record, in one step.

        Raises:
            ApiError: 507, there is no room; 503, the store cannot be reached. The old record is as it was.
        """
        self._write(json.dumps(record).encode(), owner, memory, RECORD)

    # States and texts

    def put_state(self, owner: str, memory: str, state: Any) -> str:
        """Write a state under a new name, and return the name.

        Raises:
            ApiError: 507, there is no room; 503, the store cannot be reached.
        """
        name = f"state-{secrets.token_hex(8)}.safetensors"
        with self._reached("write"):
            if self.is_local:
                make_folder(self.path(owner, memory))
                state.save(self.path(owner, memory, name))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    state.save(Path(folder) / name)
                    self._put(Path(folder) / name, owner, memory, name)
        return name

    def put_file(self, owner: str, memory: str, file: Path) -> str:
        """Write the file of a state under a new name, and return the name; errors as `put_state`."""
        name = f"state-{secrets.token_hex(8)}.safetensors"
        with self._reached("write"):
            self._put(file, owner, memory, name)
        return name

    def put_text(self, owner: str, memory: str, spool: Spool) -> str:
        """Write a whole text under a new name, and return the name; errors as `put_state`."""
        name = f"text-{secrets.token_hex(8)}.txt"
        with self._reached("write"):
            path = self.path(owner, memory, name)
            with contextlib.ExitStack() as stack:
                if self.is_local:
                    make_folder(self.path(owner, memory))
                    file: Any = stack.enter_context(stack.enter_context(replacing(path)).open("wb"))
                else:
                    self.files.makedirs(self.path(owner, memory), exist_ok=True)
                    file = stack.enter_context(self.files.open(path, "wb"))
                for piece in spool.pieces():
                    file.write(piece)
        return name

    @contextlib.contextmanager
    def local_file(self, owner: str, memory: str, name: str) -> Iterator[Path]:
        """Yield a file of this machine with what a file of the store holds.

        Raises:
            ApiError: 503, the store cannot be reached, or does not have it.
        """
        if self.is_local:
            yield Path(self.path(owner, memory, name))
            return
        with tempfile.TemporaryDirectory() as folder:
            with self._reached("read"):
                self.files.get_file(self.path(owner, memory, name), str(Path(folder) / name))
            yield Path(folder) / name

    def text(self, owner: str, memory: str, name: str) -> Spool:
        """Return a text of the store; errors as `local_file`."""
        spool = Spool()
        with self._reached("read"), self.files.open(self.path(owner, memory, name), "rb") as file:
            while piece := file.read(1 << 20):
                spool.write(piece)
        spool.end()
        return spool

    def copy(self, owner: str, memory: str, name: str, target: str) -> str:
        """Copy a file of one memory to another of the same owner, and return its new name."""
        kind, _, ending = name.partition("-")[0], "", name.rpartition(".")[2]
        new = f"{kind}-{secrets.token_hex(8)}.{ending}"
        with self._reached("write"):
            self.files.makedirs(self.path(owner, target), exist_ok=True)
            self.files.cp_file(self.path(owner, memory, name), self.path(owner, target, new))
        return new

    def remove(self, owner: str, memory: str, names: list[str]) -> None:
        """Remove files, those that are there."""
        with self._reached("delete from"):
            for name in names:
                self._remove(owner, memory, name)

    def remove_memory(self, owner: str, memory: str) -> None:
        """Remove all of a memory, its record first: without it the rest is removed at the next start at the latest.

        Raises:
            ApiError: 503, the store cannot be reached.
        """
        with self._reached("delete from"):
            self._remove(owner, memory, RECORD)
            for name in self._names(self.path(owner, memory), f"{PART}|{TEMPORARY}"):
                self._remove(owner, memory, name)
            self._remove_folder(owner, memory)

    # Idempotency keys, of stores that are shared

    def put_key(self, owner: str, key: str, memory: str) -> None:
        """Note which memory a request makes or changes; errors as `put_record`."""
        with self._reached("write"):
            if self.is_local:
                make_folder(self.path(owner))
                write_bytes(self._key(owner, key), memory.encode())
            else:
                self.files.makedirs(self.path(owner), exist_ok=True)
                self.files.pipe_file(self._key(owner, key), memory.encode())

    def memory_of_key(self, owner: str, key: str) -> str | None:
        """Return what `put_key` noted; errors as `records`."""
        with self._reached("read"), contextlib.suppress(FileNotFoundError):
            return str(self.files.cat_file(self._key(owner, key)).decode())
        return None

    def remove_keys(self, owner: str, keys: list[str]) -> None:
        """Remove notes of keys, as far as the store is reached: what is left leads to a memory that knows better."""
        for key in keys:
            with contextlib.suppress(Exception):
                self.files.rm_file(self._key(owner, key))

    def _key(self, owner: str, key: str) -> str:
        return self.path(owner, f"key-{hashlib.sha256(key.encode()).hexdigest()[:32]}")

    # Within

    def _names(self, folder: str, pattern: str) -> list[str]:
        """Return the names in a folder that are of this package's form, and no others."""
        self.files.invalidate_cache()
        if not self.files.exists(folder):
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in self.files.ls(folder, detail=False))
        return sorted(name for name in names if re.fullmatch(pattern, name))

    def _remove(self, owner: str, memory: str, name: str) -> None:
        path = self.path(owner, memory, name)
        with contextlib.suppress(FileNotFoundError):
            if self.files.exists(path):
                self.files.rm_file(path)

    def _remove_folder(self, owner: str, memory: str) -> None:
        """Remove a memory's folder where there are such and nothing is left in it; an object store has none."""
        with contextlib.suppress(OSError, NotImplementedError):
            self.files.rmdir(self.path(owner, memory))

    def _put(self, file: Path, owner: str, memory: str, name: str) -> None:
        self.files.makedirs(self.path(owner, memory), exist_ok=True)
        self.files.put_file(str(file), self.path(owner, memory, name))

    def _write(self, content: bytes, owner: str, memory: str, name: str) -> None:
        with self._reached("write"):
            if self.is_local:
                make_folder(self.path(owner, memory))
                write_bytes(self.path(owner, memory, name), content)
            else:
                self.files.makedirs(self.path(owner, memory), exist_ok=True)
                self.files.pipe_file(self.path(owner, memory, name), content)

    @contextlib.contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        """Turn the errors of a store into answers.

        Raises:
            ApiError: 507 or 503.
        """
        try:
            yield
        except ApiError:
            raise
        except Exception as error:
            if isinstance(error, TransformerFamError) and error.__cause__ is None:
                raise
            reason = str(error.__cause__ or error)
            if "No space left" in reason or "Disk quota" in reason:
                raise ApiError(
                    507,
                    "the store has no room for the state, and the memory is as it was before; free space, or delete "
                    "memories, and send the request again",
                    "store_full",
                ) from error
            raise ApiError(
                503,
                f"the server cannot {what} its store ({type(error).__name__}), and the memory is as it was before; "
                "send the request again later",
                "store_unreachable",
                None,
                5,
            ) from error
