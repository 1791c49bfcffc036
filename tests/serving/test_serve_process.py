"""A server at a socket: OpenAI's own client, a client that goes, and an end in the middle of a stream."""

import json
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served import KEY, TEXT, make_service
from typer.testing import CliRunner

from transformerfam.cli.app import app
from transformerfam.errors import TransformerFamError
from transformerfam.serving.process import JsonLines, Server, open_socket


class Running:
    """A server in a thread of the test's process."""

    def __init__(self, store: Path, grace_seconds: float = 20.0, **settings: Any) -> None:
        self.service = make_service(store, **settings)
        self.service.answers.end_ids = set()  # answers are as long as they may be
        self.server = Server(self.service, grace_seconds)
        self.socket = open_socket("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(api_key=KEY, base_url=f"{self.url}/v1", max_retries=0)

    def _run(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what uvicorn imports
            self.server.run(sockets=[self.socket])

    def end(self) -> None:
        """End as SIGTERM does."""
        self.server.should_exit = True
        self.thread.join()
        self.client.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server = Running(tmp_path_factory.mktemp("store"))
    yield server
    server.end()


def new_memory(client: Any) -> str:
    """Return a memory that has read a text."""
    made = client.post("/memories", body={"text": TEXT * 5}, cast_to=dict)
    while client.get(f"/memories/{made['id']}", cast_to=dict)["status"] == "reading":
        time.sleep(0.01)
    return str(made["id"])


def test_openai_client_runs_against_the_server(running: Running) -> None:
    """Catches a form that OpenAI's own client does not take: answers, streams, logprobs, and errors."""
    client = running.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    memory = {"memory": new_memory(client)}
    turn: Any = {"model": "tiny", "messages": [{"role": "user", "content": "The sky"}], "temperature": 0}
    kept = memory | {"memory_update": False}
    whole = client.chat.completions.create(**turn, max_tokens=8, extra_body=kept, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(
        **turn, max_tokens=8, extra_body=kept, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert len(whole.choices[0].logprobs.content) == 8
    text = client.completions.create(model="tiny", prompt="The sky", max_tokens=4, extra_body=memory, logprobs=1)
    assert len(text.choices[0].logprobs.tokens) == 4
    with pytest.raises(openai.NotFoundError, match="there is no memory 'mem_none'"):
        client.completions.create(model="tiny", prompt="The", extra_body={"memory": "mem_none"})
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="The", max_tokens=0)


def test_client_that_goes_frees_its_place(running: Running) -> None:
    """Catches an answer that is generated to its end for a client that has closed its connection."""
    memory = new_memory(running.client)
    turn: Any = {"model": "tiny", "messages": [{"role": "user", "content": "The sky"}], "max_tokens": 4096}
    stream = running.client.chat.completions.create(**turn, stream=True, extra_body={"memory": memory})
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        running.client.with_options(timeout=0.3).chat.completions.create(**turn)
    while running.service.engine.counts()["open_answers"]:
        time.sleep(0.01)
    assert running.service.engine.num_generated < 4096
    assert running.client.get(f"/memories/{memory}", cast_to=dict)["num_tokens_read"] == 141


def test_end_in_the_middle_of_a_stream_is_said_and_loses_nothing(tmp_path: Path) -> None:
    """Catches a stream that breaks off without a word, a server that waits forever, and a memory of half an answer."""
    server = Running(tmp_path, grace_seconds=0.2)
    memory = new_memory(server.client)
    turn: Any = {"model": "tiny", "messages": [{"role": "user", "content": "The sky"}], "max_tokens": 4096}
    stream = iter(server.client.chat.completions.create(**turn, stream=True, extra_body={"memory": memory}))
    next(stream)
    server.server.should_exit = True
    with pytest.raises(openai.APIError, match="the server ended before the answer was complete"):
        list(stream)
    server.end()
    again = Running(tmp_path)
    assert again.client.get(f"/memories/{memory}", cast_to=dict)["num_tokens_read"] == 141
    short = iter(again.client.chat.completions.create(**turn | {"max_tokens": 200}, stream=True))
    next(short)
    again.server.should_exit = True
    assert list(short)[-1].choices[0].finish_reason in ("length", "stop")  # within the grace it ends as it should
    again.end()


def test_log_has_one_json_object_a_line_and_no_text(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a log that no program reads, and one that keeps what clients send."""
    import logging

    with caplog.at_level(logging.INFO, "transformerfam.serving"):
        running.client.completions.create(model="tiny", prompt="The pass key is 12345", max_tokens=1)
        while not any(getattr(record, "path", "") == "/v1/completions" for record in caplog.records):
            time.sleep(0.01)  # the line is written after the answer
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("transf")]
    found = next(line for line in lines if line.get("path") == "/v1/completions")
    assert (found["method"], found["status"], found["event"], found["level"]) == ("POST", 200, "request", "info")
    assert "12345" not in json.dumps(lines)
    assert KEY not in json.dumps(lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "no key is required of them; give --api-key KEY"),
        (["--memory-budget", "many"], "--memory-budget is 'many', required is a size such as 4GB"),
        (["--max-upload", "-1"], "--max-upload is '-1', required is a size"),
        (["--api-key", "two words"], "--api-key is empty or has spaces"),
        (["--host", "203.0.113.1", "--api-key", "x"], "cannot listen at 203.0.113.1"),
        (["--shared", "--store", "memory://x", "--port", "0"], "only a folder is shared by processes of one machine"),
    ],
)
def test_command_that_cannot_serve_says_why(options: list[str], message: str) -> None:
    """Catches a server that others reach without a key, and a traceback of the socket."""
    result = CliRunner().invoke(app, ["serve", *options])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)
    assert message in " ".join(result.output.split())


def test_port_that_is_taken_is_said() -> None:
    taken = open_socket("127.0.0.1", 0)
    with pytest.raises(TransformerFamError, match="choose another --port"):
        open_socket("127.0.0.1", taken.getsockname()[1])
    taken.close()
