"""Memories in an S3 bucket, by s3fs, of a server that speaks S3 on this machine."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from served import KEY, TEXT, chat, complete, new_memory, served, text_of, wait_until_read

from transformerfam.serving.claims import LeasedClaims
from transformerfam.serving.leases import LeaseTable
from transformerfam.serving.records import owner_of
from transformerfam.serving.store import Store

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what moto imports
    moto = pytest.importorskip("moto.server", reason="moto is not installed; pip install 'moto[server]' s3fs")
    pytest.importorskip("s3fs", reason="s3fs is not installed; pip install s3fs")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # aiobotocore's, of sockets it leaves open

OWNER = owner_of(KEY)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an empty place in a bucket."""
    import s3fs

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("memories")
        yield "s3://memories/of/fam"
    server.stop()


def objects_of(bucket: str) -> list[str]:
    """Return the names of all objects."""
    store = Store(bucket, is_shared=True)
    return sorted(str(path).rpartition("/")[2] for path in store.files.find(store.root))


def test_memories_of_a_bucket_live_as_those_of_a_folder(bucket: str) -> None:
    """Catches what works with folders alone: listings that are kept, folders that must be, files that are moved."""
    with served(bucket) as client:
        memory = new_memory(client, name="book", keep_text=True)["id"]
        before = text_of(complete(client, memory=memory))
        chat(client, "The sky is blue .", memory=memory)
        client.post(f"/v1/memories/{memory}/append", json={"text": TEXT * 100})
        count = wait_until_read(client, memory)["num_tokens_read"]
        fork = client.post(f"/v1/memories/{memory}/fork", json={}).json()["id"]
        after = text_of(complete(client, memory=memory))
        assert len(objects_of(bucket)) == 2 * (1 + 1 + 3)
        engine = client.app.state.service.engine
        read_slice, slices = engine._read_slice, iter(range(9))
        engine._read_slice = lambda: next(slices, None) is not None and read_slice()
        cut = client.post("/v1/memories", json={"text": TEXT * 100}).json()["id"]
        while client.get(f"/v1/memories/{cut}").json()["num_tokens_read"] == 0:
            pass
    with served(bucket, memory_budget=0) as client:
        assert text_of(complete(client, memory=memory)) == text_of(complete(client, memory=fork)) == after != before
        assert wait_until_read(client, cut)["num_tokens_read"] == 28 * 100 + 1
        assert client.app.state.service.engine.num_read < 28 * 100 + 1 + 9 * 8
        shown = client.get("/v1/memories").json()["data"]
        assert {one["id"]: one["num_tokens_read"] for one in shown}[memory] == count
        for one in (memory, fork, cut):
            assert client.delete(f"/v1/memories/{one}").status_code == 200
            assert client.get(f"/v1/memories/{one}").status_code == 404
    assert objects_of(bucket) == []


def test_servers_of_one_bucket_see_what_the_others_did(bucket: str) -> None:
    """Catches a listing or a record that a server keeps after another one has changed it."""
    table = LeaseTable()
    with ExitStack() as stack:
        claims: Any = lambda store: LeasedClaims(table)  # noqa: E731
        one, two = (stack.enter_context(served(bucket, claims=claims)) for _ in range(2))
        headers = {"Idempotency-Key": "once"}
        memory = one.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"]
        assert two.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"] == memory
        wait_until_read(two, memory)
        for client, other in ((one, two), (two, one)):
            assert [shown["id"] for shown in client.get("/v1/memories").json()["data"]] == [memory]
            said = text_of(chat(client, "The sky is blue .", memory=memory))
            assert said
            assert text_of(complete(other, memory=memory)) == text_of(complete(client, memory=memory))
            client.patch(f"/v1/memories/{memory}", json={"name": str(id(client))})
            assert other.get("/v1/memories").json()["data"][0]["name"] == str(id(client))
        assert one.app.state.service.memories.claims.take(memory)
        assert chat(two, "The grass", memory=memory).status_code == 409
        one.app.state.service.memories.claims.free(memory)
        service = two.app.state.service
        service.store.put_state(OWNER, memory, service.memories.blank_state())  # of a server that was killed
        assert len(objects_of(bucket)) == 4
        service.memories.sweep()
        assert len(objects_of(bucket)) == 3
        two.delete(f"/v1/memories/{memory}")
        assert one.get("/v1/memories").json()["data"] == []
        assert complete(one, memory=memory).status_code == 404
    assert objects_of(bucket) == []
