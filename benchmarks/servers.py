"""Servers in separate processes, and clients that measure their answers."""

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

START_SECONDS = 300.0
POLL_SECONDS = 0.05


class ServerProcess:
    """A server of OpenAI's API in a separate process, ready for requests.

    Args:
        command: starts it, without its port.
        model: what requests call its model.
        log: file for what it prints.

    Attributes:
        seconds_start: from the start of the process to its first answer.
        client: of OpenAI's package.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message has the end of its log.
    """

    def __init__(self, command: Sequence[str], model: str, log: Path) -> None:
        import openai

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.model = model
        threads = str(torch.get_num_threads())
        environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        began = time.perf_counter()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(port)], stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.client: Any = openai.OpenAI(
            api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=3600.0
        )
        while True:
            try:
                self.client.models.list()
                break
            except openai.APIConnectionError as error:
                if self.process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}") from error
                time.sleep(POLL_SECONDS)
        self.seconds_start = time.perf_counter() - began

    def bytes_resident(self) -> int:
        """Return how much RAM the process has."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process."""
        self.process.send_signal(how)
        self.process.wait()
        self.client.close()

    # Memories, of `fam serve`

    def get(self, path: str) -> dict[str, Any]:
        """Return what a path of the API says."""
        return dict(self.client.get(path, cast_to=dict))

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a body to a path of the API, and return the answer."""
        return dict(self.client.post(path, body=body, cast_to=dict))

    def delete(self, memory: str) -> None:
        """Delete a memory."""
        self.client.delete(f"/memories/{memory}", cast_to=dict)

    def wait_until_read(self, memory: str) -> dict[str, Any]:
        """Return a memory once its texts are read."""
        while (found := self.get(f"/memories/{memory}"))["status"] == "reading":
            time.sleep(POLL_SECONDS)
        if found["status"] != "ready":
            raise RuntimeError(f"a text was not read: {found['error']}")
        return found

    def read(self, text: str) -> dict[str, Any]:
        """Return a new memory that has read a text."""
        return self.wait_until_read(self.post("/memories", text=text)["id"])

    def memories(self) -> dict[str, dict[str, Any]]:
        """Return all memories by their ids."""
        found: dict[str, dict[str, Any]] = {}
        path = "/memories?limit=1000"
        while True:
            page = self.get(path)
            found |= {memory["id"]: memory for memory in page["data"]}
            if not page["has_more"]:
                return found
            path = f"/memories?limit=1000&after={page['data'][-1]['id']}"


@contextlib.contextmanager
def fam_serve(model: str, store: Path, *options: str) -> Iterator[ServerProcess]:
    """Yield `fam serve` with its memories in a folder; it is ended afterwards."""
    command = [sys.executable, "-m", "transformerfam", "serve", "--model", model, "--store", str(store), *options]
    server = ServerProcess(command, model, store.with_suffix(".log"))
    try:
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def llama_cpp_server(gguf: Path, num_tokens: int) -> Iterator[ServerProcess]:
    """Yield llama-cpp-python's server with room for so many tokens; it is ended afterwards."""
    threads = str(torch.get_num_threads())
    options = ["--n_ctx", str(num_tokens), "--n_threads", threads, "--n_threads_batch", threads]
    command = [
        sys.executable,
        "-m",
        "llama_cpp.server",
        "--model",
        str(gguf),
        *options,
        "--interrupt_requests",
        "false",
    ]
    server = ServerProcess(command, str(gguf), gguf.with_suffix(".log"))
    try:
        yield server
    finally:
        server.end()


@dataclass
class Streamed:
    """An answer as its client got it.

    Attributes:
        seconds: when each piece of it came, since the request.
        text: all of it.
        num_tokens: tokens of it.
    """

    seconds: list[float] = field(default_factory=list)
    text: str = ""
    num_tokens: int = 0

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [after - before for before, after in zip(self.seconds, self.seconds[1:], strict=False)]


def ask(server: ServerProcess, prompt: str, max_tokens: int, memory: str | None = None, **fields: Any) -> Streamed:
    """Stream a completion, greedy where nothing else is said, after a memory where there is one."""
    body: dict[str, Any] = {} if memory is None else {"memory": memory, "memory_update": False}
    began, answer = time.perf_counter(), Streamed()
    given: dict[str, Any] = {"model": server.model, "prompt": prompt, "temperature": 0.0} | fields
    for chunk in server.client.completions.create(**given, max_tokens=max_tokens, stream=True, extra_body=body):
        if chunk.choices and chunk.choices[0].text:
            answer.seconds.append(time.perf_counter() - began)
            answer.text += chunk.choices[0].text
            answer.num_tokens += 1
    return answer


def at_once(calls: Sequence[Callable[[], Streamed]]) -> tuple[float, list[Streamed]]:
    """Run calls at the same time, and return the seconds to the last one's end, and the answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = [future.result() for future in [pool.submit(call) for call in calls]]
    return time.perf_counter() - began, answers


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of them is."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]
