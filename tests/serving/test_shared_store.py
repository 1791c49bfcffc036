"""Several servers of one store: each sees what the others did, and one at a time changes a memory."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from served import (
    KEY,
    TEXT,
    chat,
    complete,
    files_of,
    make_service,
    new_memory,
    other,
    served,
    text_of,
    wait_until_read,
)

from transformerfam.errors import TransformerFamError
from transformerfam.files.locks import hold
from transformerfam.serving.claims import FileClaims, LeasedClaims, OwnClaims
from transformerfam.serving.errors import ApiError
from transformerfam.serving.leases import LeaseTable
from transformerfam.serving.records import owner_of
from transformerfam.serving.store import Store

OWNER = owner_of(KEY)


class Clock:
    """Seconds that pass when the test says so."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def claims_of(kind: str, folder: Path, table: LeaseTable) -> Any:
    """Return what makes a server's claims of a store."""
    if kind == "files":
        return lambda store: FileClaims(folder / ".claims") if store is None else FileClaims.of(store)
    return lambda store: LeasedClaims(table)


@pytest.fixture(scope="module", params=[pytest.param("files", marks=pytest.mark.slow), "leases"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Clients of two servers of one store."""
    folder, table = tmp_path_factory.mktemp("store"), LeaseTable()
    store = folder if request.param == "files" else f"memory://{folder}"
    with ExitStack() as stack:
        claims = claims_of(request.param, folder, table)
        yield [stack.enter_context(served(store, claims=claims)) for _ in range(2)]


def test_what_one_server_makes_the_other_answers(pair: Any) -> None:
    """Catches a server that sees an old state, or none, of a memory that another one has changed."""
    one, two = pair
    memory = new_memory(one, name="book")["id"]
    assert text_of(complete(two, memory=memory)) == text_of(complete(one, memory=memory))
    assert two.get(f"/v1/memories/{memory}").json() | {"used": 0} == one.get(f"/v1/memories/{memory}").json() | {
        "used": 0
    }
    said = []
    for client, question in ((one, "The sky is blue ."), (two, "The grass ?"), (one, "Here we go .")):
        said.append(text_of(chat(client, question, memory=memory)))
    alone = new_memory(one)["id"]
    questions = ("The sky is blue .", "The grass ?", "Here we go .")
    assert said == [text_of(chat(one, question, memory=alone)) for question in questions]
    two.post(f"/v1/memories/{memory}/append", json={"text": TEXT})
    count = wait_until_read(one, memory)["num_tokens_read"]
    assert count == two.get(f"/v1/memories/{memory}").json()["num_tokens_read"] > 141
    assert text_of(complete(two, memory=memory)) == text_of(complete(one, memory=memory))


def test_lists_names_and_ends_are_seen_by_all(pair: Any) -> None:
    """Catches a list of a server's own memories alone, and a memory that one deletes and another answers."""
    one, two = pair
    memories = [new_memory(one)["id"], new_memory(two)["id"]]
    for client in pair:
        assert set(memories) <= {shown["id"] for shown in client.get("/v1/memories").json()["data"]}
        assert client.get("/v1/memories", **other(client)).json()["data"] == []
        assert complete(client, memory="../..").status_code == 404
    assert two.patch(f"/v1/memories/{memories[0]}", json={"name": "new"}).status_code == 200
    shown = {shown["id"]: shown["name"] for shown in one.get("/v1/memories").json()["data"]}
    assert (shown[memories[0]], shown[memories[1]]) == ("new", None)
    text_of(complete(one, memory=memories[1]))  # it is in the RAM of both
    assert two.delete(f"/v1/memories/{memories[1]}").status_code == 200
    assert complete(one, memory=memories[1]).status_code == 404
    assert one.delete(f"/v1/memories/{memories[1]}").status_code == 404
    mortal = new_memory(one, ttl_seconds=100)["id"]
    two.app.state.service.memories.clock = lambda: time.time() + 101
    assert mortal not in {shown["id"] for shown in two.get("/v1/memories").json()["data"]}
    two.app.state.service.memories.clock = time.time
    assert one.get(f"/v1/memories/{mortal}").status_code == 404
    cache = one.app.state.service.memories.cache
    assert memories[1] in cache._states
    one.app.state.service.memories.sweep()
    assert memories[1] not in cache._states
    assert memories[0] in cache._states


def test_idempotency_keys_hold_at_every_server(pair: Any) -> None:
    """Catches a request that is sent again to another server and done twice."""
    one, two = pair
    headers = {"Idempotency-Key": f"key {pair}"}
    memory = one.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"]
    assert two.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"] == memory
    wait_until_read(two, memory)
    for client in (two, one):
        body = {"json": {"text": TEXT}, "headers": {"Idempotency-Key": "again"}}
        assert client.post(f"/v1/memories/{memory}/append", **body).status_code in (200, 202)
        assert wait_until_read(client, memory)["num_tokens_read"] == 29 + 29
    stranger = {"headers": other(two)["headers"] | headers}
    assert two.post("/v1/memories", json={}, **stranger).json()["id"] != memory
    with one.app.state.service.memories.one.with_key(OWNER, "held"):
        refused = two.post("/v1/memories", json={}, headers={"Idempotency-Key": "held"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "key_busy")
    two.delete(f"/v1/memories/{memory}")
    assert one.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"] != memory


def test_one_server_at_a_time_changes_a_memory(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a turn of a chat that is lost because another server's took its place, and a name that is lost so."""
    one, two = pair
    memory = new_memory(one)["id"]
    memories = one.app.state.service.memories
    record = memories.claim(OWNER, memory)
    for answer in (chat(two, "The sky", memory=memory), two.post(f"/v1/memories/{memory}/append", json={"text": TEXT})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "memory_busy")
    assert two.patch(f"/v1/memories/{memory}", json={"name": "kept"}).status_code == 200
    with monkeypatch.context() as patch, memories.one.alone(memory):
        patch.setattr("transformerfam.serving.one_at_a_time.WRITE_SECONDS", 0.0)
        for answer in (two.patch(f"/v1/memories/{memory}", json={"name": "x"}), two.delete(f"/v1/memories/{memory}")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "write_busy")
    memories.commit(record, memories.state(record), status="ready")
    memories.release(memory)
    assert one.get(f"/v1/memories/{memory}").json()["name"] == "kept"
    assert chat(two, "The sky", memory=memory).status_code == 200


def test_what_no_record_names_is_removed_once_nobody_writes_it(tmp_path: Path) -> None:
    """Catches a state that is removed between its writing and that of its record, and one that is never removed."""
    one, two = (make_service(tmp_path, claims=claims_of("files", tmp_path, LeaseTable())) for _ in range(2))
    record = one.memories.add(OWNER)
    name = one.store.put_state(OWNER, record.id, one.memories.blank_state())
    two.memories.sweep()
    assert files_of(tmp_path / OWNER) == [name]
    one.memories.release(record.id)
    two.memories.sweep()
    assert files_of(tmp_path / OWNER) == []
    for service in (one, two):
        service.memories.claims.close()
        service.store.close()


def begun_by(service: Any) -> Any:
    """Return a text that a server, whose engine takes its turns by hand, has acknowledged and begun to read."""
    from transformerfam.serving.texts import Spool

    record = service.memories.add(OWNER)
    reading = service.readings.begin(record, Spool.of((TEXT * 20).encode()))
    service.readings.acknowledge(reading)
    reading.feed._thread.join()
    return reading


def test_reading_of_a_server_that_is_gone_is_resumed_by_another(tmp_path: Path) -> None:
    """Catches a text that waits for the server that began it, and one that two servers read at once."""
    clock = Clock()
    table = LeaseTable(lease_seconds=20, clock=clock)
    one, two = (make_service(f"memory://{tmp_path}", claims=claims_of("leases", tmp_path, table)) for _ in range(2))
    one.readings.save_seconds = 0.0
    reading = begun_by(one)
    memory = reading.record.id
    for _ in range(4):
        one.engine.turn()
        while reading.is_saving:
            time.sleep(0.01)
    two.readings.resume().join()
    assert not two.readings._open  # its owner is there
    one.memories.claims.close = lambda: None  # type: ignore[method-assign]
    one.memories.claims._ended.set()  # it says nothing any more
    clock.seconds = 21
    two.readings.resume()
    while memory not in two.readings._open:
        time.sleep(0.01)
    resumed = two.readings._open[memory]
    while not resumed.is_over.is_set():
        two.engine.turn()
    record = two.memories.get(OWNER, memory)
    assert (record.status, record.num_tokens_read) == ("ready", 561)
    assert two.engine.num_read == 561 - 4 * 8
    # and the one that was away finds that its part is over, in its next save
    while not reading.is_over.is_set():
        one.engine.turn()
        while reading.is_saving:
            time.sleep(0.01)
    assert one.engine.num_read == 5 * 8
    assert two.memories.get(OWNER, memory).to_json() == record.to_json()
    two.memories.claims.close()


def test_change_by_a_server_that_was_away_too_long_is_refused(tmp_path: Path) -> None:
    """Catches a turn that another server has taken meanwhile and that an older state replaces."""
    clock = Clock()
    table = LeaseTable(lease_seconds=20, clock=clock)
    one, two = (make_service(f"memory://{tmp_path}", claims=claims_of("leases", tmp_path, table)) for _ in range(2))
    new = one.memories.add(OWNER)
    one.memories.commit(new, one.memories.blank_state(), status="ready")
    one.memories.release(new.id)
    for is_held in (True, False):
        mine = one.memories.claim(OWNER, new.id)
        clock.seconds += 21
        with two.memories.claimed(OWNER, new.id) as theirs:
            done = two.memories.commit(theirs, two.engine.model.read([[1, 2]], two.memories.state(theirs)))
            if is_held:
                with pytest.raises(ApiError, match="this server was not heard of for too long"):
                    one.memories.commit(mine, one.memories.blank_state())
        one.memories.claims.beat()  # the claim is free again, and the state another one
        with pytest.raises(ApiError, match="may be changed by another one; nothing was changed here"):
            one.memories.commit(mine, one.memories.blank_state())
        one.memories.release(new.id)
        assert two.memories.get(OWNER, new.id).state == done.state
    for service in (one, two):
        service.memories.claims.close()


# Claims


@pytest.mark.parametrize("kind", ["own", "files", "leases"])
def test_claim_is_of_one_holder_until_it_is_freed(tmp_path: Path, kind: str) -> None:
    """Catches a claim that two have, and one that is never free again."""
    table = LeaseTable()
    if kind == "own":
        one = two = OwnClaims()
    else:
        one, two = (claims_of(kind, tmp_path, table)(None) for _ in range(2))
    assert one.take("a")
    assert one.confirm("a")
    assert not one.take("a")
    assert not two.take("a")
    assert two.take("b")
    if one is not two:
        assert not two.confirm("a")
        two.free("a")
        assert one.confirm("a")
    one.free("a")
    assert two.take("a")
    two.close()
    assert one.take("a")
    one.close()
    if kind == "files":
        assert list((tmp_path / ".claims").iterdir()) == []


def test_file_claims_of_a_killed_process_are_free(tmp_path: Path) -> None:
    """Catches a memory that nobody can change any more after SIGKILL."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = FileClaims(tmp_path)
            held.take("a")
            os.write(writing, b"1")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(reading, 1)
    claims = FileClaims(tmp_path)
    assert not claims.take("a")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert claims.take("a")
    claims.close()
    for end in (reading, writing):
        os.close(end)


def test_file_that_its_holder_removes_while_another_locks_it_is_not_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a claim of a file that is gone, which a third process does not see and takes, too."""
    from filelock import lock_descriptor

    def late(fd: int, *, blocking: bool) -> bool:
        (tmp_path / "a.lock").unlink()
        monkeypatch.undo()
        return lock_descriptor(fd, blocking=blocking)

    one, two = FileClaims(tmp_path), FileClaims(tmp_path)
    monkeypatch.setattr("transformerfam.serving.claims.lock_descriptor", late)
    assert one.take("a")
    assert not two.take("a")
    one.close()


def test_table_frees_what_a_silent_holder_had_and_a_new_table_learns_it() -> None:
    """Catches claims of replicas that are gone, and a table that was started again and gives claims twice."""
    clock = Clock()
    table = LeaseTable(lease_seconds=20, clock=clock)
    assert table.take("one", "a")
    assert table.take("one", "a")  # a call that is sent again
    clock.seconds = 15
    table.beat("one", ["a"])
    clock.seconds = 34
    assert not table.take("two", "a")
    clock.seconds = 35.5
    assert table.take("two", "a")
    table.beat("one", ["a", "c"])
    assert (table.confirm("one", "a"), table.confirm("one", "c")) == (False, True)
    again = LeaseTable(lease_seconds=20, clock=clock)
    again.beat("two", ["a"])
    assert not again.take("one", "a")
    again.leave("two")
    assert again.take("one", "a")


def test_claims_that_nobody_decides_on_are_an_answer(tmp_path: Path) -> None:
    """Catches a change that is made though nobody knows who else makes one, and a traceback."""

    class Unreached(LeaseTable):
        def take(self, holder: str, name: str) -> bool:
            raise ConnectionError("no")

    with served(f"memory://{tmp_path}", claims=lambda store: LeasedClaims(Unreached())) as client:
        answer = client.post("/v1/memories", json={"text": TEXT})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "claims_unreachable")
        assert client.get("/v1/memories").json()["data"] == []


def test_store_that_is_no_folder_is_not_shared_by_files() -> None:
    with pytest.raises(TransformerFamError, match="only a folder is shared by processes of one machine"):
        make_service("memory://x", claims=FileClaims.of)


def test_folder_is_shared_by_all_its_servers_or_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a server that takes a folder for its own while others use it."""
    monkeypatch.setattr("transformerfam.files.locks.LOCK_SECONDS", 0.0)
    stores = [Store(str(tmp_path), is_shared=True) for _ in range(2)]
    for _ in range(2):
        with pytest.raises(TransformerFamError, match="is written by another process"):
            Store(str(tmp_path))
        stores.pop().close()
    alone = Store(str(tmp_path))
    with pytest.raises(TransformerFamError, match="is written by another process"):
        Store(str(tmp_path), is_shared=True)
    alone.close()
    hold(str(tmp_path / ".lock"), "it").release()
