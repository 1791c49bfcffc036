"""What does a server hold, and how fast does it answer? Restarts, streams, memories per GB, ten minutes of traffic.

llama-cpp-python's server runs beside it where it is installed, on the same numbers as float32 and the same document.
"""

import functools
import importlib.util
import itertools
import math
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, row, spread
from benchmarks.llama_cpp import gguf_file
from benchmarks.servers import ServerProcess, ask, at_once, fam_serve, llama_cpp_server, percentile
from transformerfam.tasks.text import encode, read_text
from transformerfam.weights.models import load_model

MODELS = ("tiny", "smollm2")
LENGTHS = (1024, 32_768, 262_144)
DOCUMENT_TOKENS = 32_768
STREAMS = (1, 4, 8, 16, 64)
PEER_USERS = (1, 8)
NUM_MEMORIES = {"tiny": 1000, "smollm2": 100}
SOAK_SECONDS, NUM_CLIENTS, BUDGET_BYTES = 600.0, 8, 256_000_000
KEY_TEXT = "The pass key is {}. Remember it. {} is the pass key. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTIONS = {"tiny": "What is the pass key? The pass key is", "smollm2": " And then she said:"}


def run(model: str = "smollm2", quick: bool = False, lengths: Sequence[int] = LENGTHS) -> Iterator[Row]:
    """Measure restarts, streams, and a soak, whose end gives the memories per GB."""
    if model not in MODELS:
        return  # a random model has no tokenizer
    with tempfile.TemporaryDirectory() as folder:
        yield from restarts(model, Path(folder) / "restart", (64, 128) if quick else lengths, 1 if quick else 3)
        yield from streams(model, Path(folder) / "streams", (1, 2) if quick else STREAMS, 4 if quick else 48)
        yield from soak(model, Path(folder) / "soak", 4 if quick else NUM_MEMORIES[model], 1 if quick else SOAK_SECONDS)
    if model == "smollm2" and not quick:
        yield from llama_cpp()


def text_of(model: str, num_tokens: int) -> str:
    """Return a text of about so many tokens: for tiny a key and filler, else a novel, repeated where needed."""
    text = FILLER if model == "tiny" else read_text("persuasion")
    share = num_tokens / _num_tokens(model, text)
    body = (text * math.ceil(share))[: int(share * len(text))]
    return KEY_TEXT.format("71432", "71432") + body if model == "tiny" else body


@functools.cache
def _num_tokens(model: str, text: str) -> int:
    return len(encode(load_model(model)[1], text))


def short_text(model: str, key: str) -> str:
    """Return a text of some hundred tokens, another one for each key: the key itself for tiny, else part of a novel."""
    if model == "tiny":
        return KEY_TEXT.format(key, key) + FILLER * 8
    return read_text("persuasion")[4 * int(key) :][:2000]


# Restart


def restarts(model: str, store: Path, lengths: Sequence[int], repeats: int) -> Iterator[Row]:
    """Yield the seconds from a process's first question to its first token, by tokens that were read before."""
    with fam_serve(model, store) as server:
        memories = {length: server.read(text_of(model, length)) for length in lengths}
    first: dict[int, list[float]] = {length: [] for length in lengths}
    start: dict[int, list[float]] = {length: [] for length in lengths}
    warm: dict[int, list[float]] = {length: [] for length in lengths}
    for _, length in itertools.product(range(repeats), lengths):
        with fam_serve(model, store) as server:
            start[length].append(server.seconds_start)
            for seconds in (first, warm):
                answer = ask(server, QUESTIONS[model], 4, memories[length]["id"])
                seconds[length].append(answer.seconds[0])
    for length, memory in memories.items():
        yield row(
            "serving_restart",
            system="fam serve",
            model=model,
            tokens_read=memory["num_tokens_read"],
            **spread("seconds", first[length]),
            **spread("seconds_warm", warm[length]),
            **spread("seconds_start", start[length]),
            bytes_file=memory["bytes"],
        )


# Streams


def streams(model: str, store: Path, counts: Sequence[int], max_tokens: int, repeats: int = 3) -> Iterator[Row]:
    """Yield tokens per second of answers at the same time, each of another memory at another place of the block."""
    most = max(counts)
    options = ("--max-batch", str(most), "--max-readings", str(most))
    text = text_of(model, 600)
    with fam_serve(model, store, *options) as server:
        memories = [server.read(text[: len(text) // 3 + i * len(text) * 2 // 3 // most])["id"] for i in range(most)]
        rates: dict[int, list[float]] = {count: [] for count in counts}
        gaps: dict[int, list[float]] = {count: [] for count in counts}
        for _, count in itertools.product(range(repeats), counts):
            seconds, answers = at_once(_questions(server, model, memories[:count], max_tokens))
            rates[count].append(sum(answer.num_tokens for answer in answers) / seconds)
            gaps[count] += [gap for answer in answers for gap in answer.gaps]
        rss = server.bytes_resident()
    for count in counts:
        yield row(
            "serving_streams",
            system="fam serve",
            model=model,
            streams=count,
            max_tokens=max_tokens,
            **_rates(rates[count]),
            seconds_between_tokens_p95=percentile(gaps[count], 0.95),
            bytes_resident=rss,
        )


def _questions(server: ServerProcess, model: str, memories: Sequence[str], max_tokens: int) -> list[Callable[[], Any]]:
    """Return questions that are answered by any tokens but the one that ends an answer, so that they are long."""
    return [
        lambda memory=memory, seed=seed: ask(server, QUESTIONS[model], max_tokens, memory, temperature=1.0, seed=seed)
        for seed, memory in enumerate(memories)
    ]


def _rates(rates: Sequence[float]) -> Row:
    return {"tokens_per_second": sorted(rates)[len(rates) // 2]} | spread("tokens_per_second", rates)


# Soak


@dataclass
class Traffic:
    """What clients did to memories, and what must be true of these afterwards.

    Attributes:
        required: tokens that each memory must have read; those being changed are not in it.
        keys: of each memory, the key that it knows.
        errors: requests that failed, each with what it said.
        gaps: seconds between two tokens of an answer.
        counts: requests of each kind.
    """

    required: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    num_right: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, draw: random.Random) -> tuple[str, int]:
        """Return a memory that nobody changes, which is the caller's until it is put back."""
        with self.lock:
            memory = draw.choice(list(self.required))
            return memory, self.required.pop(memory)

    def put(self, memory: str, num_tokens: int, key: str) -> None:
        """Note what a memory must have read."""
        with self.lock:
            self.required[memory], self.keys[memory] = num_tokens, key


def new_memory(server: ServerProcess, model: str, key: str, traffic: Traffic) -> None:
    """Read a new text into a new memory."""
    memory = server.read(short_text(model, key))
    traffic.put(memory["id"], memory["num_tokens_read"], key)


def act(server: ServerProcess, model: str, draw: random.Random, traffic: Traffic) -> None:
    """Do one thing to one memory: ask it, append to it, fork it, or put a new one in its place."""
    kind = draw.choices(("ask", "append", "fork", "replace"), (6, 2, 1, 1))[0]
    memory, num_tokens = traffic.take(draw)
    key = traffic.keys[memory]
    try:
        if kind == "ask":
            answer = ask(server, QUESTIONS[model], 8 if model == "tiny" else 24, memory)
            with traffic.lock:
                traffic.gaps += answer.gaps
                traffic.num_right += key in answer.text.replace(" ", "")
        elif kind == "append":
            server.post(f"/memories/{memory}/append", text=FILLER)
            num_tokens = server.wait_until_read(memory)["num_tokens_read"]
        elif kind == "fork":
            copy = server.post(f"/memories/{memory}/fork")
            traffic.put(copy["id"], num_tokens, key)
        else:
            new_memory(server, model, str(draw.randrange(10_000, 100_000)), traffic)
        if kind in ("fork", "replace"):  # so that there are as many as before
            server.delete(memory)
            memory = ""
    except Exception as error:
        with traffic.lock:
            traffic.errors.append(f"{kind}: {type(error).__name__}: {error}"[:300])
    with traffic.lock:
        traffic.counts[kind] = traffic.counts.get(kind, 0) + 1
        if memory:
            traffic.required[memory] = num_tokens


def soak(model: str, store: Path, num_memories: int, seconds: float, clients: int = NUM_CLIENTS) -> Iterator[Row]:
    """Yield what mixed traffic on many memories comes to; the server is killed at its end, and must have lost none."""
    traffic = Traffic()
    options = ("--memory-budget", str(BUDGET_BYTES), "--max-readings", "64")
    with fam_serve(model, store, *options) as server:
        rss_start = server.bytes_resident()
        draw = random.Random(0)
        for _ in range(num_memories):
            new_memory(server, model, str(draw.randrange(10_000, 100_000)), traffic)
        facts = server.memories()
        rss_filled, rss_most = server.bytes_resident(), 0
        end = time.perf_counter() + seconds

        def client(seed: int) -> None:
            nonlocal rss_most
            own = random.Random(seed)
            while time.perf_counter() < end:
                act(server, model, own, traffic)
                rss_most = max(rss_most, server.bytes_resident())

        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(client, seed) for seed in range(min(clients, num_memories))]:
                future.result()
        metrics = _metrics(server)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    with fam_serve(model, store, *options) as server:
        there = server.memories()
    lost = [m for m, tokens in traffic.required.items() if m not in there or there[m]["num_tokens_read"] != tokens]
    asked = traffic.counts.get("ask", 0)
    yield row(
        "serving_soak",
        system="fam serve",
        model=model,
        memories=num_memories,
        clients=clients,
        seconds_traffic=seconds,
        **{f"num_{kind}": count for kind, count in sorted(traffic.counts.items())},
        errors=len(traffic.errors),
        first_error=(traffic.errors or [""])[0],
        lost=len(lost),
        **({"keys_right": traffic.num_right / max(asked, 1)} if model == "tiny" else {}),
        seconds_between_tokens_p95=percentile(traffic.gaps, 0.95) if len(traffic.gaps) > 1 else None,
        bytes_budget=BUDGET_BYTES,
        bytes_resident_at_start=rss_start,
        bytes_resident_at_most=rss_most,
    )
    per_file = sum(memory["bytes"] for memory in facts.values()) / len(facts)
    in_ram = metrics["fam_ram_state_bytes"] / max(metrics["fam_ram_states"], 1)
    yield row(
        "serving_density",
        system="fam serve",
        model=model,
        memories=num_memories,
        bytes_file=round(per_file),
        bytes_ram=round(in_ram),
        memories_per_gb_disk=round(1e9 / per_file),
        memories_per_gb_ram=round(1e9 / in_ram),
        bytes_resident_per_memory=round((rss_filled - rss_start) / num_memories),
    )


def _metrics(server: ServerProcess) -> dict[str, float]:
    """Return the gauges of a server."""
    import urllib.request

    url = str(server.client.base_url).replace("/v1/", "/metrics")
    with urllib.request.urlopen(url) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#" and "{" not in line}


# The peer


def llama_cpp() -> Iterator[Row]:
    """Yield what llama-cpp-python's server does with a document after a restart, and with one and more users."""
    fields = {"system": "llama.cpp server", "model": "smollm2"}
    if importlib.util.find_spec("llama_cpp") is None:
        yield row("serving_restart", **fields, skipped="llama-cpp-python[server] is not installed")
        return
    document = text_of("smollm2", DOCUMENT_TOKENS)
    question = document + QUESTIONS["smollm2"]
    with llama_cpp_server(gguf_file(is_int8=False), DOCUMENT_TOKENS + 2048) as server:
        first, again = (ask(server, question, 4).seconds[0] for _ in range(2))
        yield row(
            "serving_restart",
            **fields,
            tokens_read=DOCUMENT_TOKENS,
            **spread("seconds", [first]),
            **spread("seconds_warm", [again]),
            **spread("seconds_start", [server.seconds_start]),
        )
        for users in PEER_USERS:
            prompts = [document[: 1500 + 60 * user] + QUESTIONS["smollm2"] for user in range(users)]
            calls = [lambda prompt=prompt: ask(server, prompt, 48, temperature=1.0) for prompt in prompts]
            seconds, answers = at_once(calls)
            rate = sum(answer.num_tokens for answer in answers) / seconds
            yield row("serving_streams", **fields, streams=users, max_tokens=48, **_rates([rate]))
