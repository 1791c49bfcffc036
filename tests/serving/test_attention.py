"""Where a memory looks, over HTTP: what a plain reading records, in slices, of kept texts and of others."""

import json
from typing import Any

import pytest
import torch
from served import TEXT, chat, complete, make_service, new_memory, other, served, text_of
from tiny_llama import make_tiny_llama, random_ids

from transformerfam import FamConfig, convert
from transformerfam.serving.texts import TokenFeed
from transformerfam.tasks.text import encode_rest, encode_start
from transformerfam.tools.attention_record import read_end_of_block, record_attention


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server that the tests of a module share."""
    with served(tmp_path_factory.mktemp("store")) as made:
        yield made


def look(client: Any, memory: str, **body: Any) -> list[Any]:
    """Return the events of a look, without the end of the stream."""
    response = client.post(f"/v1/memories/{memory}/attention", json=body)
    assert response.status_code == 200, response.text
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note of every text that is looked at whether it begins a reading, with the tokens that begin one."""
    noted: list[bool] = []

    def feed(*arguments: Any, begins: bool, **options: Any) -> TokenFeed:
        noted.append(begins)
        return TokenFeed(*arguments, begins=begins, **options)

    monkeypatch.setattr("transformerfam.serving.attention.TokenFeed", feed)
    return noted


def recorded(model: Any, ids: Any) -> list[list[torch.Tensor]]:
    """Return how every layer's rows look at each block of a text that is read at once, `(F, block)`."""
    length, size = model.fam_config.fam_length, model.fam_config.block_size
    num_layers = model.config.num_hidden_layers
    rows = [
        record.weights_HRS[:, :length, -size:].mean(0)
        for record in record_attention(model, ids, layers=range(num_layers))
        if record.weights_HRS is not None
    ]
    return [rows[start : start + num_layers] for start in range(0, len(rows), num_layers)]


@pytest.mark.parametrize("preset", ["paper", "gated", "gated_rows"])
def test_end_of_a_block_shows_the_rows_attention_to_all_of_it(preset: str) -> None:
    """Catches a record of the last slice alone, of token rows, or a state that a recording moves otherwise."""
    shape = {"block_size": 8, "fam_length": 3, "num_sink_tokens": 2, "fam_key_bias": 0.0}
    model: Any = convert(make_tiny_llama(3), FamConfig.preset(preset, **shape))
    ids, state, found = random_ids(1, 24), model.init_state(), []
    for start in (0, 8, 16):
        model.read(ids[:, start : start + 5], state)
        found.append(read_end_of_block(model, ids[:, start + 5 : start + 8], state))
    for there, required in zip(found, recorded(model, ids), strict=True):
        torch.testing.assert_close(there, required, atol=1e-5, rtol=1e-5)
    whole = model.read(ids)
    torch.testing.assert_close(state.fams, whole.fams, atol=1e-5, rtol=1e-5)


def test_kept_text_shows_what_a_plain_reading_records(client: Any, tmp_path: Any) -> None:
    """Catches weights of other blocks, rows or layers than a plain reading's, tokens next to them, and a memory that
    moves because somebody looks."""
    made = new_memory(client, keep_text=True)
    before = client.get(f"/v1/memories/{made['id']}").json()
    *blocks, end = look(client, made["id"], layers=True)
    model = make_service(tmp_path).engine.model
    tokenizer = client.app.state.service.answers.tokenizer
    ids = encode_start(tokenizer, TEXT * 5)
    required = recorded(model, ids)
    assert len(blocks) == len(required) == len(ids) // 8
    for number, (block, rows) in enumerate(zip(blocks, required, strict=True)):
        assert (block["block"], block["first_token"]) == (number, 8 * number)
        for layer, weights_FT in zip(block["layers"], rows, strict=True):
            torch.testing.assert_close(torch.tensor(layer["weights"]), weights_FT.mean(0), atol=2e-5, rtol=0)
            torch.testing.assert_close(torch.tensor(layer["share_of_rows"]), weights_FT.sum(-1), atol=2e-5, rtol=0)
        mean = torch.stack(rows).mean((0, 1))
        torch.testing.assert_close(torch.tensor(block["weights"]), mean, atol=2e-5, rtol=0)
        assert block["share"] == pytest.approx(float(mean.sum()), abs=2e-5)
    said = "".join(token for block in blocks for token in block["tokens"])
    assert TEXT in said
    assert (end["num_blocks"], end["num_tokens_read"], end["is_whole"]) == (len(blocks), len(ids), True)
    after = client.get(f"/v1/memories/{made['id']}").json()
    assert {name: after[name] for name in after if name != "used"} == {n: before[n] for n in before if n != "used"}


def test_chosen_blocks_are_those_of_the_whole(client: Any) -> None:
    """Catches blocks that are counted wrong, and a reading that goes on to the end for the sake of one block."""
    memory = new_memory(client, keep_text=True)["id"]
    *blocks, _ = look(client, memory)
    *some, end = look(client, memory, first_block=3, num_blocks=2)
    assert [block["block"] for block in some] == [3, 4]
    assert [block["tokens"] for block in some] == [block["tokens"] for block in blocks[3:5]]
    assert [block["weights"] for block in some] == [block["weights"] for block in blocks[3:5]]
    assert (end["num_tokens_read"], end["is_whole"]) == (40, False)
    assert "layers" not in blocks[0]


def test_another_text_follows_what_the_memory_has_read(client: Any, begun: list[bool]) -> None:
    """Catches a text that is looked at by an empty memory, blocks that begin with it, and a memory that reads it."""
    memory = new_memory(client)["id"]
    *blocks, _ = look(client, memory, text=" The pass key is 54321." * 4)
    assert blocks[0]["block"] == 141 // 8
    assert blocks[0]["tokens"][:6] == [None] * 5 + [" The"]  # 141 tokens: five of the block were read before
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == 141
    answered = text_of(complete(client, memory=memory, memory_update=True, max_tokens=2))
    *blocks, _ = look(client, memory, text=" The pass key is 54321." * 4)
    assert answered.endswith(next(token for token in blocks[0]["tokens"] if token is not None))
    tokenizer = client.app.state.service.answers.tokenizer
    empty = client.post("/v1/memories", json={}).json()["id"]
    *blocks, end = look(client, empty, text=TEXT)
    assert end["num_tokens_read"] == len(encode_start(tokenizer, TEXT))
    assert blocks[0]["block"] == 0
    assert begun == [False, False, True]


def test_appended_texts_and_turns_are_looked_at_in_order(client: Any, begun: list[bool]) -> None:
    """Catches a look at the first text alone, and special tokens that begin each of several texts."""
    memory = new_memory(client, keep_text=True)["id"]
    client.post(f"/v1/memories/{memory}/append", json={"text": " There and back again." * 5})
    while client.get(f"/v1/memories/{memory}").json()["status"] == "reading":
        pass
    text_of(chat(client, "The sky is blue .", memory=memory))
    *_, end = look(client, memory)
    tokenizer = client.app.state.service.answers.tokenizer
    least = len(encode_start(tokenizer, TEXT * 5)) + len(encode_rest(tokenizer, " There and back again." * 5))
    assert end["num_tokens_read"] > least
    assert begun == [True, False, False]
    assert abs(end["num_tokens_read"] - client.get(f"/v1/memories/{memory}").json()["num_tokens_read"]) <= 1


def test_look_that_is_not_possible_says_why(client: Any, tmp_path: Any) -> None:
    """Catches a look at a text that nobody kept, at another key's memory, and one of a model without rows."""
    memory = new_memory(client)["id"]

    def refused(status: int, code: str, body: dict[str, Any], **headers: Any) -> str:
        answer = client.post(f"/v1/memories/{memory}/attention", json=body, **headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        return str(answer.json()["error"]["message"])

    assert "keep_text = true" in refused(409, "text_not_kept", {})
    refused(404, "memory_not_found", {}, **other(client))
    for body in ({"num_blocks": 0}, {"first_block": -1}, {"text": ""}, {"blocks": 3}):
        refused(400, "invalid_value", body)
    service = client.app.state.service
    held = service.engine.max_readings
    service.engine.max_readings = 0
    refused(429, "queue_full", {"text": TEXT})
    service.engine.max_readings = held
    config = service.engine.model.fam_config
    service.engine.model.fam_config = config.without_fam()
    try:
        assert "no FAM rows" in refused(400, "invalid_request", {"text": TEXT})
    finally:
        service.engine.model.fam_config = config
    unknown = client.post(f"/v1/memories/{memory}/attention", json={"text": "verbose daemon option " * 20})
    assert "words that the tokenizer does not know" in unknown.text
