"""Two replicas on a local Ray: what one makes the other answers, and one is killed in the middle of its work."""

import contextlib
import gc
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from served import KEY, OTHER_KEY, TEXT

from transformerfam.errors import TransformerFamError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Ray does with pydantic
    ray = pytest.importorskip("ray", reason="ray is not installed; pip install 'transformerfam[ray]'")
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from transformerfam.serving.ray import Arguments, Replica, app

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of processes and files that it leaves to their end

CONFIG = Path(__file__).parents[2] / "docs" / "howto" / "ray.yaml"
PORT = 8765
SECONDS = 200.0
"""How long something is waited for that comes in a few seconds on a machine with nothing else to do."""


@pytest.mark.parametrize(
    ("store", "message"),
    [("memory://x", "each replica would have for itself"), ("memories", "give the whole path of a folder")],
)
def test_store_that_replicas_would_not_share_is_refused(store: str, message: str) -> None:
    """Catches memories that are there in every second request."""
    with pytest.raises(TransformerFamError, match=message):
        app(Arguments(store=store, is_open=True))


def test_application_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches replicas that whoever reaches them can use, and keys of which one is left out."""
    monkeypatch.delenv("FAM_API_KEY", raising=False)
    with pytest.raises(TransformerFamError, match="the environment of the replicas has no FAM_API_KEY"):
        app(Arguments(store="/tmp/x"))
    monkeypatch.setenv("FAM_API_KEY", f"{KEY} {OTHER_KEY}")
    settings = Arguments(store="s3://bucket/x", memory_budget="2GB").settings()
    assert (settings.keys, settings.memory_budget) == ((KEY, OTHER_KEY), 2_000_000_000)


def test_config_file_of_the_docs_is_one_of_serve_and_of_ours() -> None:
    """Catches an example with a word that Serve, or this package, does not take."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = config.applications
    assert application.import_path == "transformerfam.serving.ray:app"
    assert Arguments(**application.args).memory_budget == 4_000_000_000
    assert [one.name for one in application.deployments] == ["Memories"]


def start_ray() -> None:
    """Start a small Ray; it gives itself 30 seconds, which a busy machine may not have."""
    for attempt in range(3):
        try:
            ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
            return
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of two replicas on a Ray of this machine, with one folder."""
    own = {"FAM_API_KEY": f"{KEY} {OTHER_KEY}", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        start_ray()
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            replica: Any = Replica
            options = {"num_replicas": 2, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 1}}
            times = {"health_check_period_s": 1, "graceful_shutdown_timeout_s": 10}
            store = tmp_path_factory.mktemp("store")
            args = Arguments(store=str(store), max_tokens=1_000_000, save_seconds=0.5, sweep_seconds=2.0)
            serve.run(replica.options(**options, **times).bind(args), name="memories", route_prefix="/")
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", headers=headers, timeout=SECONDS) as made:
                yield made
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Ray's processes, which end after it has left them
                serve.shutdown()
                ray.shutdown()
                gc.collect()


def wait_for(get: Any) -> Any:
    """Return what comes in a few seconds."""
    end = time.monotonic() + SECONDS
    while not (found := get()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.1)
    return found


def process_of(replica: str) -> int:
    """Return the process of a replica."""
    actor = ray.get_actor(f"SERVE_REPLICA::memories#Memories#{replica}", namespace="serve")
    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))


def ready(client: Any, memory: str) -> dict[str, Any]:
    """Return a memory once it is ready."""

    def get() -> Any:
        shown = client.get(f"/v1/memories/{memory}").json()
        return shown if shown["status"] == "ready" else None

    return dict(wait_for(get))


def answer(client: Any, memory: str) -> tuple[str, str]:
    """Return the text of an answer, and which replica gave it."""
    body = {"model": "tiny", "prompt": " The pass key is", "max_tokens": 5, "temperature": 0, "memory": memory}
    got = client.post("/v1/completions", json=body)
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["text"], got.headers["x-replica"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replica_that_is_killed_in_the_middle_loses_nothing(client: Any) -> None:
    """Catches memories of one replica alone, a stream that comes as a whole, half an answer, and a text never read."""
    memory = client.post("/v1/memories", json={"text": TEXT * 5}).json()["id"]
    count = ready(client, memory)["num_tokens_read"]
    answers: dict[str, str] = {}
    while len(answers) < 2:
        text, replica = answer(client, memory)
        answers[replica] = text
    assert len(set(answers.values())) == 1

    long = TEXT * 3000
    made = client.post("/v1/memories", json={"text": long}, headers={"Idempotency-Key": "long"})
    reading, killed = made.json()["id"], made.headers["x-replica"]
    body = {"model": "tiny", "prompt": " The", "max_tokens": 900_000, "memory": memory, "memory_update": True}
    lines: list[str] = []
    while not lines:
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            if stream.status_code != 200 or stream.headers["x-replica"] != killed:
                continue  # by the other replica, or that one still ends what we left
            with contextlib.suppress(httpx.HTTPError):  # it is cut, or ends with an error
                for line in stream.iter_lines():
                    lines.append(line)
                    if len(lines) == 10:
                        saved = client.get(f"/v1/memories/{reading}").json()
                        os.kill(process_of(killed), signal.SIGKILL)
    assert saved["status"] == "reading"
    assert "data: [DONE]" not in lines

    text, replica = answer(client, memory)
    assert (text, replica != killed) == (next(iter(answers.values())), True)
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] == count
    again = client.post("/v1/memories", json={"text": long}, headers={"Idempotency-Key": "long"})
    assert again.json()["id"] == reading
    short = body | {"max_tokens": 2}
    wait_for(lambda: client.post("/v1/completions", json=short).status_code == 200)  # its claim is over
    assert client.get(f"/v1/memories/{memory}").json()["num_tokens_read"] > count
    assert ready(client, reading)["num_tokens_read"] == 28 * 3000 + 1
