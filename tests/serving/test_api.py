"""The server's answers, without a socket: OpenAI's API, chats, and memories from their making to their end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from served import (
    TEXT,
    chat,
    complete,
    files_of,
    new_memory,
    other,
    served,
    text_of,
    wait_until_read,
)
from tiny_models import make_passkey_model

from transformerfam import FamState
from transformerfam.tasks.reading import read_text_stream


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that the tests of a module share, each with its own memories."""
    with served(tmp_path_factory.mktemp("store")) as made:
        yield made


def events_of(response: Any) -> list[Any]:
    """Return what the server-sent events of a stream hold."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Answers


def test_completion_is_what_the_model_says_after_the_memory(client: Any) -> None:
    """Catches a memory that is named and not used, or moved by a question."""
    memory = new_memory(client)["id"]
    with_memory = [text_of(complete(client, memory=memory)) for _ in range(2)]
    assert with_memory[0] == with_memory[1] != text_of(complete(client))
    assert with_memory[0] != text_of(complete(client, memory=new_memory(client, "There and back again. " * 9)["id"]))
    again = complete(client, memory=memory).json()["usage"]
    assert (again["memory_tokens"], again["prompt_tokens"], again["completion_tokens"]) == (141, 4, 6)


@pytest.mark.parametrize("kind", [complete, chat])
def test_stream_gives_what_the_whole_answer_is(client: Any, kind: Any) -> None:
    """Catches pieces that are lost at a token's or a stop text's edge, and a stream without its end."""
    for fields in ({}, {"stop": ["text b"]}, {"max_tokens": 1}):
        whole = kind(client, "The pass key is", **fields)
        events = events_of(kind(client, "The pass key is", stream=True, **fields))
        said = [choice for event in events[:-1] for choice in event["choices"]]
        pieces = [choice.get("text", choice.get("delta", {}).get("content")) or "" for choice in said]
        assert "".join(pieces) == text_of(whole)
        assert said[-1]["finish_reason"] == whole.json()["choices"][0]["finish_reason"]
        assert events[-1] == "[DONE]"
    usage = events_of(kind(client, "The", stream=True, stream_options={"include_usage": True}))[-2]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6


def test_answer_ends_before_a_stop_text(client: Any) -> None:
    """Catches a stop text that is given out, whole or in part, and one that is cut over two tokens and missed."""
    whole = text_of(complete(client, max_tokens=12))
    stop = whole[5:9]
    stopped = complete(client, max_tokens=12, stop=stop)
    assert text_of(stopped) == whole[: whole.index(stop)]
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    assert text_of(complete(client, max_tokens=12, stop=["nowhere", stop])) == whole[: whole.index(stop)]


def test_seed_gives_the_same_draws_and_temperature_others(client: Any) -> None:
    """Catches a seed that is dropped, and a nucleus or a temperature that is not used."""
    drawn = {seed: text_of(complete(client, temperature=2, seed=seed, max_tokens=12)) for seed in (1, 2)}
    assert drawn[1] == text_of(complete(client, temperature=2, seed=1, max_tokens=12)) != drawn[2]
    assert text_of(complete(client, temperature=2, top_p=1e-9, seed=3)) == text_of(complete(client))


def test_logprobs_are_those_of_the_tokens(client: Any) -> None:
    """Catches logarithms of other tokens than those that were drawn, and one form for both kinds of answer."""
    found = complete(client, logprobs=2).json()["choices"][0]
    given = found["logprobs"]
    assert "".join(given["tokens"]) == found["text"]
    assert [max(top.values()) for top in given["top_logprobs"]] == given["token_logprobs"]  # greedy
    assert all(len(top) == 2 for top in given["top_logprobs"])
    named = chat(client, "The sky", logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in named] == [one["top_logprobs"][0]["logprob"] for one in named]
    assert bytes(named[0]["bytes"]).decode() == named[0]["token"]
    assert chat(client, "The sky", logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.slow
def test_many_memories_are_answered_at_once_as_each_alone(client: Any) -> None:
    """Catches answers that change with the company they are generated in."""
    from concurrent.futures import ThreadPoolExecutor

    memories = [new_memory(client, TEXT * n)["id"] for n in (1, 3, 4)]
    alone = [text_of(complete(client, memory=memory, max_tokens=20)) for memory in memories]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda memory: text_of(complete(client, memory=memory, max_tokens=20)), memories * 2))
    assert found == alone * 2


# Chats


def test_chat_continues_by_its_new_turn_or_by_its_history_alike(client: Any) -> None:
    """Catches turns that are read twice, and a client that sends all of them and gets another answer."""
    by_turn, by_history = (new_memory(client)["id"] for _ in range(2))
    asked, history, counts = ["The sky is blue .", "The grass ?", "Here we go ."], [], []
    for question in asked:
        alone = chat(client, question, memory=by_turn)
        whole = chat(client, *history, question, memory=by_history)
        assert text_of(alone) == text_of(whole)
        counts.append([answer.json()["usage"]["prompt_tokens"] for answer in (alone, whole)])
        history += [question, text_of(alone)]
    assert all(one == two for one, two in counts)
    reading = [client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] for memory in (by_turn, by_history)]
    assert reading[0] == reading[1]


def test_chat_of_a_memory_is_the_chat_of_its_whole_text(client: Any) -> None:
    """Catches an answer that is lost between two turns, or a token of it that is read twice or never."""
    memory = client.post("/v1/memories", json={}).json()["id"]
    first = text_of(chat(client, "The sky is blue", memory=memory))
    second = chat(client, "The grass", memory=memory)
    plain = f"user is The sky is blue . assistant is{first} . user is The grass . assistant is"
    assert text_of(second) == text_of(complete(client, prompt=plain))


def test_other_history_is_refused_and_the_same_one_is_not_answered_twice(client: Any) -> None:
    """Catches a memory that mixes two chats."""
    memory = new_memory(client)["id"]
    answer = text_of(chat(client, "The sky", memory=memory))
    refused = chat(client, "The sky", "another answer", "The grass", memory=memory)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "history_differs")
    assert "differ from message 1 on" in refused.json()["error"]["message"]
    assert chat(client, "The sky", answer, memory=memory).status_code == 400
    assert chat(client, "The sky", answer, "The grass", memory=memory).status_code == 200


def test_stop_text_is_not_in_the_memory_of_a_chat(client: Any) -> None:
    """Catches a memory that has read beyond what its client was given."""
    memories = [client.post("/v1/memories", json={}).json()["id"] for _ in range(2)]
    whole = text_of(chat(client, "The sky is blue", memory=memories[0], memory_update=False, max_tokens=12))
    stop = whole.split()[3]
    said = text_of(chat(client, "The sky is blue", memory=memories[1], stop=" " + stop, max_tokens=12))
    plain = f"user is The sky is blue . assistant is{said} . user is The grass . assistant is"
    assert text_of(chat(client, "The grass", memory=memories[1])) == text_of(complete(client, prompt=plain))


@pytest.mark.slow
def test_memory_of_a_chat_may_stay_as_it_is_and_one_of_a_completion_may_move(client: Any) -> None:
    memory = new_memory(client)["id"]
    texts = {text_of(chat(client, "The sky", memory=memory, memory_update=False)) for _ in range(2)}
    assert len(texts) == 1
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141
    complete(client, memory=memory, memory_update=True)
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141 + 4 + 5


# Memories


def test_text_is_read_as_fam_read_reads_it(client: Any, tmp_path: Path) -> None:
    """Catches a text that loses or gains tokens on its way over HTTP, in pieces that cut characters."""
    model, tokenizer = make_passkey_model(update="gated")
    content = (TEXT * 10).encode()

    def pieces() -> Any:
        for start in range(0, len(content), 100):
            yield content[start : start + 100]

    made = client.post("/v1/memories?name=book&keep_text=true", content=pieces()).json()
    read = wait_until_read(client, made["id"])
    state = read_text_stream(model, tokenizer, [TEXT * 10])
    assert read["num_tokens_read"] == state.num_tokens_read
    assert (read["name"], read["keep_text"]) == ("book", True)
    path = tmp_path / "state"
    path.write_bytes(client.get(f"/v1/memories/{made['id']}/state").content)
    assert path.stat().st_size > read["bytes"] == state.file_bytes


def test_state_goes_down_and_up_again(client: Any, tmp_path: Path) -> None:
    """Catches a file that no other program loads, and a memory that loses something on the way."""
    memory = new_memory(client)["id"]
    content = client.get(f"/v1/memories/{memory}/state").content
    (tmp_path / "state").write_bytes(content)
    service = client.app.state.service
    assert FamState.load(tmp_path / "state", service.engine.model).num_tokens_read == 141
    made = client.post("/v1/memories/state?name=again", content=content)
    assert made.status_code == 201
    assert text_of(complete(client, memory=made.json()["id"])) == text_of(complete(client, memory=memory))


@pytest.mark.slow
def test_fork_append_rename_and_list(client: Any) -> None:
    """Catches a fork that moves with its origin, and fields that are not kept."""
    memory = new_memory(client, name="first")["id"]
    fork = client.post(f"/v1/memories/{memory}/fork", json={"name": "second"}).json()
    assert (fork["name"], fork["num_tokens_read"], fork["status"]) == ("second", 141, "ready")
    assert client.post(f"/v1/memories/{fork['id']}/append", json={"text": " " + TEXT}).status_code == 202
    assert wait_until_read(client, fork["id"])["num_tokens_read"] > 141
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141
    changed = client.patch(f"/v1/memories/{memory}", json={"name": None, "ttl_seconds": 1000}).json()
    assert changed["name"] is None
    assert changed["expires"] >= changed["created"] + 1000
    shown = client.get("/v1/memories?limit=1").json()
    rest = client.get(f"/v1/memories?limit=1000&after={shown['data'][0]['id']}").json()
    assert shown["has_more"]
    assert {memory, fork["id"]} <= {one["id"] for one in (*shown["data"], *rest["data"])}
    appended = client.post(f"/v1/memories/{memory}/append", content=TEXT.encode())
    assert wait_until_read(client, appended.json()["id"])["num_tokens_read"] > 141


@pytest.mark.slow
def test_progress_ends_when_the_text_is_read(client: Any) -> None:
    """Catches events that never end, or that do not count up."""
    memory = client.post("/v1/memories", json={"text": TEXT * 20}).json()["id"]
    events = events_of(client.get(f"/v1/memories/{memory}/progress"))
    counts = [event["num_tokens_read"] for event in events]
    assert counts == sorted(counts)
    assert events[-1]["status"] == "ready"


@pytest.mark.slow
def test_time_to_live_ends_a_memory_and_a_clock_set_back_does_not(tmp_path: Path) -> None:
    """Catches memories that outlive their time, and a clock set back that ends others or goes below what was said."""
    with served(tmp_path) as client:
        memories = client.app.state.service.memories
        memory, kept = new_memory(client, ttl_seconds=100)["id"], new_memory(client)
        memories.clock = lambda: time.time() - 10**6
        text_of(complete(client, memory=kept["id"]))
        assert client.get(f"/v1/memories/{kept['id']}").json()["used"] >= kept["created"]
        assert client.get(f"/v1/memories/{memory}").status_code == 200
        memories.clock = lambda: time.time() + 101
        assert client.get(f"/v1/memories/{memory}").status_code == 404
        assert [one["id"] for one in client.get("/v1/memories").json()["data"]] == [kept["id"]]
        assert len(files_of(tmp_path)) == 2


@pytest.mark.slow
def test_idempotency_key_makes_one_memory_and_one_append(tmp_path: Path) -> None:
    """Catches a client that tries again and pays, or reads, twice; after a restart, too."""
    headers = {"Idempotency-Key": "a"}
    with served(tmp_path) as client:
        made = [client.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"] for _ in range(2)]
        memory = wait_until_read(client, made[0])["id"]
        assert made[0] == made[1]
        stranger = {"headers": other(client)["headers"] | headers}
        assert client.post("/v1/memories", json={}, **stranger).json()["id"] != memory
        for _ in range(2):
            client.post(f"/v1/memories/{memory}/append", json={"text": TEXT}, headers={"Idempotency-Key": "b"})
            count = wait_until_read(client, memory)["num_tokens_read"]
    with served(tmp_path) as client:
        assert client.post("/v1/memories", json={"text": TEXT}, headers=headers).json()["id"] == memory
        client.post(f"/v1/memories/{memory}/append", json={"text": TEXT}, headers={"Idempotency-Key": "b"})
        assert wait_until_read(client, memory)["num_tokens_read"] == count


def test_keys_do_not_see_each_other(client: Any) -> None:
    """Catches a memory that another key can use, list, change or find out about."""
    memory = new_memory(client)["id"]
    paths = [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/append"), ("POST", "/fork"), ("GET", "/progress")]
    for method, path in [*paths, ("GET", "/state")]:
        body = {"json": {"text": "x"} if path == "/append" else {}} if method in ("POST", "PATCH") else {}
        answer = client.request(method, f"/v1/memories/{memory}{path}", **body, **other(client))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "memory_not_found"), (method, path)
    assert complete(client, memory=memory).status_code == 200
    body = {"model": "tiny", "prompt": "The", "memory": memory}
    assert client.post("/v1/completions", json=body, **other(client)).status_code == 404
    assert client.get("/v1/memories", **other(client)).json()["data"] == []


@pytest.mark.slow
def test_restart_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Catches memories, names, chats, and texts that were taken and not read yet, that end with the process."""
    with served(tmp_path) as client:
        memory = new_memory(client, name="kept")["id"]
        first = text_of(chat(client, "The sky is blue .", memory=memory))
        before = text_of(complete(client, memory=memory))
        waiting = client.post("/v1/memories", json={"text": TEXT * 300}).json()
        assert waiting["status"] == "reading"
    with served(tmp_path) as client:
        assert client.get(f"/v1/memories/{memory}").json()["name"] == "kept"
        assert text_of(complete(client, memory=memory)) == before
        assert chat(client, "The sky is blue .", first, "The grass ?", memory=memory).status_code == 200
        assert client.get(f"/v1/memories/{waiting['id']}").json()["status"] in ("reading", "ready")
        assert client.delete(f"/v1/memories/{waiting['id']}").status_code == 200
        assert client.get(f"/v1/memories/{waiting['id']}").status_code == 404


def test_text_that_was_being_read_is_read_after_a_restart(tmp_path: Path) -> None:
    """Catches a reading that is begun again and not ended, or that has read its text twice."""
    with served(tmp_path) as client:
        memory = new_memory(client)["id"]
        engine = client.app.state.service.engine
        engine._read_slice = lambda: False  # type: ignore[method-assign]
        assert client.post(f"/v1/memories/{memory}/append", json={"text": TEXT}).json()["status"] == "reading"
        new = client.post("/v1/memories", json={"text": TEXT}).json()["id"]
    with served(tmp_path) as client:
        assert wait_until_read(client, new)["num_tokens_read"] == 29
        assert wait_until_read(client, memory)["num_tokens_read"] == 141 + 29


@pytest.mark.slow
def test_ram_holds_what_its_budget_allows_and_the_store_all(tmp_path: Path) -> None:
    """Catches a tier that grows with the number of memories, and answers that depend on where a state was."""
    with served(tmp_path, memory_budget=4_000) as client:
        memories = [new_memory(client, TEXT * n)["id"] for n in range(1, 6)]
        cache = client.app.state.service.memories.cache
        assert 0 < cache.num_bytes <= 4_000
        answers = [text_of(complete(client, memory=memory)) for memory in memories]
        assert cache.num_misses > 0
        assert cache.num_bytes <= 4_000
        cache.budget_bytes = 0
        assert [text_of(complete(client, memory=memory)) for memory in memories] == answers


def test_deletion_reaches_every_tier(tmp_path: Path) -> None:
    """Catches a state or a text that is still in RAM or in the store once it was deleted, or while it is read."""
    with served(tmp_path) as client:
        service = client.app.state.service
        memory = new_memory(client, keep_text=True)["id"]
        chat(client, "The sky is blue .", memory=memory)
        client.post(f"/v1/memories/{memory}/append", json={"text": TEXT})
        wait_until_read(client, memory)
        assert len(files_of(tmp_path)) == 1 + 1 + 3  # record, state, and three texts
        assert memory in service.memories.cache._states
        reading = client.post("/v1/memories", json={"text": TEXT * 2_000}).json()["id"]
        for one in (memory, reading):
            assert client.delete(f"/v1/memories/{one}").json() == {
                "id": one,
                "object": "memory.deleted",
                "deleted": True,
            }
            assert client.get(f"/v1/memories/{one}").status_code == 404
        assert memory not in service.memories.cache._states
        while service.engine.counts()["open_readings"] or service.readings._open:
            time.sleep(0.01)
        assert files_of(tmp_path) == []


def test_memory_of_other_weights_is_refused_or_read_again(tmp_path: Path) -> None:
    """Catches an answer from a memory that means nothing to these weights."""
    with served(tmp_path) as client:
        lost, kept = new_memory(client)["id"], new_memory(client, keep_text=True)["id"]
        chat(client, "The sky is blue .", memory=kept)
        state = client.get(f"/v1/memories/{lost}/state").content
    with served(tmp_path, seed=1) as client:
        refused = complete(client, memory=lost)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "read_again")
        assert "read the text again" in refused.json()["error"]["message"]
        uploaded = client.post("/v1/memories/state", content=state)
        assert (uploaded.status_code, uploaded.json()["error"]["code"]) == (409, "read_again")
        while client.get(f"/v1/memories/{kept}").json()["fingerprint"] != client.app.state.service.memories.fingerprint:
            time.sleep(0.01)
        again = wait_until_read(client, kept)
        assert again["num_tokens_read"] > 141 + 6
        assert complete(client, memory=kept).status_code == 200
        assert len(files_of(tmp_path)) == 2 + 2 + 2


def test_health_and_metrics_need_no_key(client: Any) -> None:
    """Catches a monitor that is locked out, and counters of another name."""
    for path in ("/health", "/metrics"):
        assert client.get(path, headers={"Authorization": ""}).status_code == 200
    complete(client)
    shown = client.get("/metrics").text
    assert 'fam_requests_total{method="POST",path="/v1/completions",status="200"}' in shown
    for name in (
        "fam_memories",
        "fam_ram_states",
        "fam_ram_state_bytes",
        "fam_generated_tokens",
        "fam_first_token_seconds_count",
    ):
        assert name in shown


def test_service_of_a_plain_model_is_refused(tmp_path: Path) -> None:
    """Catches a model that is served without a memory, in silence."""
    from tiny_llama import make_tiny_llama

    from transformerfam.errors import TransformerFamError
    from transformerfam.serving.service import Service, Settings

    with pytest.raises(TransformerFamError, match="the model has no memory yet"):
        Service(make_tiny_llama(), None, "tiny", Settings(str(tmp_path)))
