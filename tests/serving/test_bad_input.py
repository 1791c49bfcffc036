"""What goes wrong: each has a status, a body in OpenAI's form, and leaves every memory as it was."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from served import TEXT, chat, complete, files_of, make_service, new_memory, served, text_of, wait_until_read

from transformerfam.errors import TransformerFamError
from transformerfam.serving.memories import Memories
from transformerfam.serving.store import Store


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that the tests of a module share, each with its own memories."""
    with served(tmp_path_factory.mktemp("store"), max_body=20_000, max_upload=50_000) as made:
        yield made


def refusal(response: Any, status: int, code: str) -> str:
    """Require a status and OpenAI's form of an error, and return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert "Traceback" not in response.text
    return str(error["message"])


PLAIN = {"model": "tiny", "prompt": "The"}


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"max_tokens": 0}, "invalid_value", "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 10**9}, "invalid_value", "max_tokens is 1000000000, allowed are 4096"),
        ({"max_tokens": "many"}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"seed": 2**70}, "invalid_value", "seed"),
        ({"stop": [""]}, "invalid_value", "stop is at most 4 texts of 1 to 1,000 characters"),
        ({"stop": ["a"] * 5}, "invalid_value", "stop is at most 4"),
        ({"n": 2}, "invalid_value", "n is not served; leave it out"),
        ({"echo": True}, "invalid_value", "echo is not served"),
        ({"logit_bias": {"5": 1}}, "invalid_value", "logit_bias is not served"),
        ({"prompt": ""}, "invalid_value", "the prompt is empty"),
        ({"prompt": []}, "invalid_value", "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "invalid_value", "there are several prompts"),
        ({"prompt": [10**6]}, "invalid_value", "a token id beyond the model's 58 tokens"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"memory_update": True}, "invalid_value", "memory_update is true and no memory is named"),
        ({"model": None}, "invalid_value", "model"),
    ],
)
def test_completion_that_is_not_served_says_why(client: Any, change: Any, code: str, message: str) -> None:
    """Catches fields that are left out in silence, and tracebacks."""
    assert message in refusal(client.post("/v1/completions", json=PLAIN | change), 400, code)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages"),
        ([{"role": "assistant", "content": "x"}], "the last message is the assistant's"),
    ],
)
def test_chat_that_is_not_served_says_why(client: Any, messages: Any, message: str) -> None:
    body = {"model": "tiny", "messages": messages}
    assert message in refusal(client.post("/v1/chat/completions", json=body), 400, "invalid_value")


def test_field_that_there_is_not_is_named(client: Any) -> None:
    """Catches a slip in a field's name that the answer does not name."""
    answer = client.post("/v1/memories", json={"text": "The sky is blue.", "nmae": "x"})
    assert refusal(answer, 400, "invalid_value").startswith("nmae: there is no such field")
    assert answer.json()["error"]["param"] == "nmae"


def test_template_that_is_missing_or_fails_is_named(client: Any) -> None:
    """Catches a chat in a form that the model was never trained on."""
    template = client.app.state.service.answers.template
    before = template.template
    for text, code in ((None, "no_chat_template"), ("{{ raise_exception('alternate!') }}", "invalid_value")):
        template.template = text
        message = refusal(chat(client, "The sky"), 400, code)
    assert "alternate!" in message
    template.template = before


def test_key_is_required_for_all_but_health_and_metrics(client: Any) -> None:
    """Catches a path that says something without a key, or that there is none."""
    for header in ("", "Bearer", "Bearer wrong", "Basic key-of-anna", "Bearer key-of-annä".encode("latin-1")):
        for path in ("/v1/models", "/v1/memories?limit=x", "/nowhere"):
            answer = client.get(path, headers={"Authorization": header})
            refusal(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"


def test_bodies_that_are_none_are_refused(client: Any) -> None:
    """Catches 500 for what a client sends, and bodies without an end."""
    for content, status, code in (
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        (b'{"model": "\xff"}', 400, "not_utf8"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "not_utf8"),
        (b"[" * 9_000, 400, "invalid_json"),
        (b"x" * 20_001, 413, "body_too_large"),
    ):
        refusal(client.post("/v1/completions", content=content), status, code)
    refusal(client.post("/v1/memories", content=iter([TEXT.encode() * 100] * 9)), 413, "body_too_large")
    refusal(client.post("/v1/memories", content=b""), 400, "invalid_value")
    refusal(client.post("/v1/memories", files={"file": b"x"}), 415, "unsupported_media_type")
    refusal(client.get("/v1/memories?limit=x"), 400, "invalid_value")
    refusal(client.get("/v1/memories?limit=0"), 400, "invalid_value")
    refusal(client.post("/v1/memories", json={"text": "a", "nmae": "b"}), 400, "invalid_value")
    refusal(client.post("/v1/memories?keep_text=perhaps", content=b"a"), 400, "invalid_value")
    refusal(client.post("/v1/memories", json={}, headers={"Idempotency-Key": "k" * 201}), 400, "invalid_value")
    assert "no such path" in refusal(client.get("/nowhere"), 404, "no_such_path")
    refusal(client.put("/v1/models"), 405, "no_such_path")


def test_text_that_is_not_utf8_is_refused_and_forgotten(client: Any) -> None:
    """Catches half a text that is read as if it were all, and a memory that is left over."""
    count = len(client.get("/v1/memories").json()["data"])
    message = refusal(
        client.post("/v1/memories", content=iter([TEXT.encode(), b"\xff" + TEXT.encode()])), 400, "not_utf8"
    )
    assert f"0xff near position {len(TEXT)}" in message
    refusal(client.post("/v1/memories", content=TEXT.encode() + "é".encode()[:1]), 400, "not_utf8")
    refusal(
        client.post("/v1/memories", content=b'{"text": "\\ud800"}', headers={"Content-Type": "application/json"}),
        400,
        "not_utf8",
    )
    assert len(client.get("/v1/memories").json()["data"]) == count
    memory = new_memory(client)["id"]
    refusal(client.post(f"/v1/memories/{memory}/append", content=b"\xff"), 400, "not_utf8")
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141
    assert client.post(f"/v1/memories/{memory}/append", json={"text": TEXT}).status_code == 202


def test_text_of_unknown_words_fails_with_the_reason(client: Any) -> None:
    """Catches a manual of which a model of fifty words reads one unknown word after the other."""
    made = client.post("/v1/memories", json={"text": "daemons write verbose logs " * 50}).json()
    failed = wait_until_read(client, made["id"], "failed")
    assert "words that the tokenizer does not know" in failed["error"]
    refusal(complete(client, memory=made["id"]), 409, "memory_not_ready")
    read = new_memory(client, "daemons write verbose logs " * 50, allow_unknown=True)
    assert read["unknown_tokens"] == 200


def test_memory_that_is_unknown_or_no_state_is_refused(client: Any) -> None:
    for memory in ("mem_none", "../..", ""):
        refusal(complete(client, memory=memory), 404, "memory_not_found")
    refusal(chat(client, "x", memory="mem_none"), 404, "memory_not_found")
    refusal(complete(client, model="gpt-4"), 404, "model_not_found")
    for content in (b"", b"x" * 100, TEXT.encode()):
        message = refusal(client.post("/v1/memories/state", content=content), 400, "invalid_state")
        assert "/tmp" not in message


def test_two_changes_of_one_memory_at_once_are_one_and_a_refusal(client: Any) -> None:
    """Catches an append that is lost because another one took its place, and a claim that is never given up."""
    service, memory = client.app.state.service, new_memory(client)["id"]
    service.memories.claim(service.owner("Bearer key-of-anna"), memory)
    answers = [client.post(f"/v1/memories/{memory}/append", json={"text": TEXT}), chat(client, "The", memory=memory)]
    answers.append(client.post(f"/v1/memories/{memory}/fork", json={}))
    for answer in answers:
        refusal(answer, 409, "memory_busy")
        assert answer.headers["retry-after"] == "1"
    assert complete(client, memory=memory).status_code == 200
    service.memories.release(memory)
    for _ in range(2):
        assert chat(client, "The sky", memory=memory).status_code == 200
        refusal(chat(client, "The sky", memory=memory, max_tokens=10**6), 400, "invalid_value")


def test_full_queue_is_429_and_leaves_no_memory(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a memory that is noted and never read, and one that stays claimed by a request that was refused."""
    engine, memory = client.app.state.service.engine, new_memory(client)["id"]
    count = len(client.get("/v1/memories").json()["data"])
    monkeypatch.setattr(engine, "max_readings", 0)
    monkeypatch.setattr(engine, "max_batch", 0)
    monkeypatch.setattr(engine, "max_waiting", 0)
    for answer in (
        client.post("/v1/memories", json={"text": TEXT}),
        complete(client),
        chat(client, "x", memory=memory),
    ):
        refusal(answer, 429, "queue_full")
        assert answer.headers["retry-after"] == "2"
    monkeypatch.undo()
    assert len(client.get("/v1/memories").json()["data"]) == count
    assert chat(client, "The sky", memory=memory).status_code == 200


@pytest.mark.parametrize("reason", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_state_that_cannot_be_saved_leaves_the_old_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    """Catches an answer of a memory that is lost with the next restart, and a half of a state."""
    with served(tmp_path) as client:
        memory = new_memory(client)["id"]
        before, files = text_of(complete(client, memory=memory)), files_of(tmp_path)

        def full(tensors: Any, temporary: str, metadata: Any) -> None:
            Path(temporary).write_bytes(b"half")
            raise OSError(reason, os.strerror(reason))

        with monkeypatch.context() as patch:
            patch.setattr("transformerfam.files.tensors.save_file", full)
            status, code = (507, "store_full") if reason == errno.ENOSPC else (503, "store_unreachable")
            message = refusal(chat(client, "The sky", memory=memory), status, code)
            assert "the memory is as it was before" in message
            assert code in chat(client, "The sky", memory=memory, stream=True).text
            appended = client.post(f"/v1/memories/{memory}/append", json={"text": TEXT}).json()
            failed = wait_until_read(client, appended["id"], "failed")
            assert "the memory is as it was before" in failed["error"]
        assert text_of(complete(client, memory=memory)) == before
    with served(tmp_path) as client:  # the text that was acknowledged is read now
        assert wait_until_read(client, memory)["num_tokens_read"] == 141 + 29
        assert len(files_of(tmp_path)) == len(files)


def test_store_that_cannot_be_reached_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, and an acknowledgement of what is not in the store."""
    with served("memory://unreached") as client:
        memory, service = new_memory(client)["id"], client.app.state.service
        service.memories.cache.drop(memory)
        with monkeypatch.context() as patch:
            for name in ("get_file", "pipe_file", "open", "put_file", "exists"):
                patch.setattr(service.store.files, name, lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no")))
            for answer in (
                complete(client, memory=memory),
                client.post("/v1/memories", json={"text": TEXT}),
                client.post("/v1/memories", json={}),
                client.delete(f"/v1/memories/{memory}"),
            ):
                refusal(answer, 503, "store_unreachable")
        assert len(client.get("/v1/memories").json()["data"]) == 1
        assert complete(client, memory=memory).status_code == 200


def test_store_of_no_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransformerFamError, match="the store is 'nowhere://x'"):
        Store("nowhere://x")


def test_store_leaves_files_of_others_alone(tmp_path: Path) -> None:
    """Catches a folder of somebody's that is swept because it was given as the store."""
    for name in ("book.txt", "a/record.json", "0123456789abcdef/mem_0/state.safetensors", "0123456789abcdef/notes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    with served(tmp_path) as client:
        memory = new_memory(client)["id"]
        client.delete(f"/v1/memories/{memory}")
    assert len(files_of(tmp_path)) == 4


def test_kill_at_any_moment_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    """Catches half of a state, a record of a state that is not there, and files that are never removed."""
    service = make_service(tmp_path)
    memories, model = service.memories, service.engine.model
    record = memories.add("0" * 16)
    memories.commit(record, model.read([[1, 2, 3]]), status="ready")
    service.store.close()
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    latest = memories.get("0" * 16, record.id)
                    state = memories.state(latest)
                    memories.commit(latest, model.read([[4]], state))
            finally:
                os._exit(1)
        killer = threading.Timer(0.05 + 0.03 * attempt, os.kill, (child, signal.SIGKILL))
        killer.start()
        os.waitpid(child, 0)
        killer.join()
        store = Store(str(tmp_path))
        memories = Memories(store, model, "tiny", 10**6)
        found = memories.get("0" * 16, record.id)
        assert memories.state(found).num_tokens_read == found.num_tokens_read
        assert len(files_of(tmp_path)) == 2
        store.close()
    assert found.num_tokens_read > 4


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    """Catches half of a state that stays in the store, where no deletion finds it."""
    with served(tmp_path) as client:
        memory = new_memory(client)["id"]
        folder = next(tmp_path.rglob("record.json")).parent
    for name in (".tmp48NRdc", f"state-{'0' * 16}.safetensors", f".state-{'0' * 16}.safetensors.{'0' * 8}"):
        (folder / name).write_bytes(b"half")
    with served(tmp_path) as client:
        assert len(files_of(tmp_path)) == 2
        (folder / ".tmpAbC123").write_bytes(b"half")
        client.delete(f"/v1/memories/{memory}")
        assert files_of(tmp_path) == []


def test_client_that_goes_in_the_middle_leaves_the_memory(client: Any) -> None:
    """Catches an answer that is generated for nobody, and a memory that has read half a turn or stays claimed."""
    from transformerfam.serving.schemas import ChatBody

    service, memory = client.app.state.service, new_memory(client)["id"]
    owner = service.owner("Bearer key-of-anna")

    async def leave() -> None:
        message = {"role": "user", "content": "The sky"}
        body = ChatBody(model="tiny", memory=memory, messages=[message], max_tokens=4000, temperature=0)
        answer = await service.answers.start(owner, body)
        async for _ in answer.pieces():
            break
        answer.close()

    client.portal.call(leave)
    while service.engine.counts()["open_answers"]:
        time.sleep(0.01)
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141
    assert chat(client, "The sky", memory=memory).status_code == 200
