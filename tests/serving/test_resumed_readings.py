"""Texts whose reading was cut off: resumed where they were saved last, whatever ended the server."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from served import TEXT, files_of, make_service, new_memory, served, wait_until_read

from transformerfam.serving.memories import Memories
from transformerfam.serving.service import Service
from transformerfam.serving.store import Store
from transformerfam.serving.texts import Spool, TokenFeed

OWNER = "0" * 16


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def stepped_service(store: Any, **settings: Any) -> tuple[Service, Clock]:
    """Return a service whose engine takes its turns by hand, in slices of equal length, and its clock."""
    service, clock = make_service(store, **settings), Clock()
    service.engine.clock = service.readings.clock = clock
    return service, clock


def tokenised(service: Service, memory: str) -> Any:
    """Return the open reading of a memory once all its tokens are there, so that slices do not depend on threads."""
    while memory not in service.readings._open:
        time.sleep(0.01)
    reading = service.readings._open[memory]
    reading.feed._thread.join()
    return reading


def begun(service: Service, text: str, append_to: str | None = None) -> Any:
    """Return the open reading of an acknowledged text."""
    memories = service.memories
    if append_to is None:
        record, state = memories.add(OWNER), None
    else:
        record = memories.claim(OWNER, append_to)
        state = memories.state(record)
    reading = service.readings.begin(record, Spool.of(text.encode()), state)
    service.readings.acknowledge(reading)
    return tokenised(service, record.id)


def read_to_the_end(service: Service, reading: Any) -> None:
    while not reading.is_over.is_set():
        service.engine.turn()


def killed(service: Service) -> None:
    """Let a service end as by SIGKILL, once what was to be saved is saved: nothing more is written."""
    service.readings._savers.shutdown(wait=True)
    for reading in service.readings._open.values():
        reading.feed.close()
    service.store.close()


def content_of(store: Path, service: Service, memory: str) -> dict[str, Any]:
    """Return the bytes of every tensor of a memory's state, and its metadata."""
    record = service.memories.get(OWNER, memory)
    with safe_open(store / OWNER / memory / str(record.state), "pt") as file:
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
        return tensors | file.metadata()


def long_reading(service: Any, is_append: bool) -> Any:
    """Begin to read a long text, into a new memory or into one that has read another."""
    first = None
    if is_append:
        before = begun(service, TEXT * 3)
        read_to_the_end(service, before)
        first = before.record.id
    return begun(service, TEXT * 20, first)


@pytest.mark.parametrize("is_append", [pytest.param(False, marks=pytest.mark.slow), True])
def test_reading_of_a_killed_server_is_resumed_to_the_same_bits(tmp_path: Path, is_append: bool) -> None:
    """Catches a text that is begun again after a kill, and tokens that are read twice or never at the place of it."""
    service, clock = stepped_service(tmp_path / "killed")
    reading = long_reading(service, is_append)
    memory = reading.record.id
    for num_turns, seconds in ((3, 61.0), (1, 0.0), (4, 61.0), (1, 0.0), (5, 0.0)):
        for _ in range(num_turns):
            service.engine.turn()
        clock.seconds += seconds
        while reading.is_saving:
            time.sleep(0.01)
    killed(service)
    again, _ = stepped_service(tmp_path / "killed")
    saved = again.memories.get(OWNER, memory)
    assert 0 < saved.partial_taken < reading.feed.num_taken
    assert again.readings.num_tokens_of(saved) == saved.partial_tokens_read > saved.num_tokens_read
    again.readings.resume()
    resumed = tokenised(again, memory)
    assert again.readings.num_tokens_of(saved) == saved.partial_tokens_read
    read_to_the_end(again, resumed)

    whole, _ = stepped_service(tmp_path / "whole")
    uncut = long_reading(whole, is_append)
    before = whole.engine.num_read
    read_to_the_end(whole, uncut)
    read = whole.engine.num_read - before
    assert again.engine.num_read == read - saved.partial_taken  # and no more
    name = uncut.record.id
    assert content_of(tmp_path / "killed", again, memory) == content_of(tmp_path / "whole", whole, name)
    assert len(files_of(tmp_path / "killed")) == len(files_of(tmp_path / "whole")) == 2
    for one in (again, whole):
        one.store.close()


def test_server_that_ends_saves_what_it_has_read(tmp_path: Path) -> None:
    """Catches a restart, of a new version say, that costs the hours of an open reading."""
    with served(tmp_path) as client:
        memory = new_memory(client)["id"]
        engine = client.app.state.service.engine
        read_slice, slices = engine._read_slice, iter(range(6))
        engine._read_slice = lambda: next(slices, None) is not None and read_slice()
        client.post(f"/v1/memories/{memory}/append", json={"text": TEXT * 20})
        while client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141:
            time.sleep(0.01)
    with served(tmp_path) as client:
        service = client.app.state.service
        assert wait_until_read(client, memory)["num_tokens_read"] == 141 + 561
        assert 0 < service.engine.num_read < 561
        assert len(files_of(tmp_path)) == 2


def test_text_that_is_deleted_while_it_is_read_is_not_read_further(tmp_path: Path) -> None:
    """Catches hours of reading, and a file, for a memory that another server has deleted."""
    service, clock = stepped_service(tmp_path)
    reading = begun(service, TEXT * 20)
    service.engine.turn()
    service.memories.delete(OWNER, reading.record.id)
    clock.seconds = 61.0
    read_to_the_end(service, reading)
    assert service.engine.num_read < 100
    assert files_of(tmp_path) == []
    killed(service)


def test_part_that_other_weights_have_read_is_read_again(tmp_path: Path) -> None:
    """Catches a reading that begins with the rows of one model and ends with those of another."""
    service, clock = stepped_service(tmp_path)
    reading = begun(service, TEXT * 20)
    clock.seconds = 61.0
    service.engine.turn()
    killed(service)
    other, _ = stepped_service(tmp_path, seed=1)
    assert other.memories.get(OWNER, reading.record.id).partial_taken > 0
    other.readings.resume()
    read_to_the_end(other, tokenised(other, reading.record.id))
    record = other.memories.get(OWNER, reading.record.id)
    assert (record.status, record.partial, record.fingerprint) == ("ready", None, other.memories.fingerprint)
    assert other.engine.num_read == record.num_tokens_read == 561
    assert len(files_of(tmp_path)) == 2
    other.store.close()


def test_text_that_is_shorter_than_what_was_read_of_it_is_refused() -> None:
    """Catches a memory that is said to be ready though its tokenizer has changed under its text."""
    from tiny_models import make_passkey_model

    from transformerfam.errors import TransformerFamError

    feed = TokenFeed(Spool.of(TEXT.encode()), make_passkey_model()[1], begins=False, num_taken=1000)
    feed._thread.join()
    with pytest.raises(TransformerFamError, match=r"the text has 29 tokens, of which 1000 were read before"):
        feed.take(5)
    feed.close()


def test_kill_at_any_moment_of_a_save_leaves_the_old_or_the_new_part(tmp_path: Path) -> None:
    """Catches a record that names half a part of a reading, and parts that stay in the store."""
    service = make_service(tmp_path)
    memories, model = service.memories, service.engine.model
    record = memories.add(OWNER)
    spool = Spool.of(b"The sky is blue.")
    memories.write(record, pending=[service.store.put_text(OWNER, record.id, spool)])
    spool.close()
    service.store.close()
    path = tmp_path / OWNER / record.id / "record.json"
    for attempt in range(4):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    latest = memories.get(OWNER, record.id)
                    state = model.init_state() if latest.partial is None else memories.partial(latest)
                    memories.save_partial(latest, model.read([[4]], state), latest.partial_taken + 1)
            finally:
                os._exit(1)
        before = path.read_bytes()
        while path.read_bytes() == before:
            pass
        time.sleep(0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = Store(str(tmp_path))
        memories = Memories(store, model, "tiny", 10**6)
        found = memories.get(OWNER, record.id)
        if found.partial is not None:
            assert memories.partial(found).num_tokens_read == found.partial_tokens_read == found.partial_taken
        assert len(files_of(tmp_path)) == len(found.files) + 1
        store.close()
    assert found.partial_taken >= 4
