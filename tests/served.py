"""A server of a tiny random model, without a socket."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient
from tiny_models import make_passkey_model

from transformerfam.serving.app import make_app
from transformerfam.serving.service import Service, Settings

KEY, OTHER_KEY = "key-of-anna", "key-of-berta"
TEXT = "The grass is green. The sky is blue. The pass key is 12345. Remember it. Here we go. "
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} is {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant is{% endif %}"
)


def make_service(store: Any, seed: int = 0, claims: Any = None, **settings: Any) -> Service:
    """Make a service of a tiny model; another seed gives other weights, and with claims the store is shared."""
    import torch

    torch.manual_seed(seed)
    model, tokenizer = make_passkey_model(update="gated")
    if seed:
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.01)
    given: dict[str, Any] = {"keys": (KEY, OTHER_KEY), "chat_template": TEMPLATE} | settings
    return Service(model.eval(), tokenizer, "tiny", Settings(str(store), **given), claims=claims)


@contextmanager
def served(store: Any, key: str = KEY, **settings: Any) -> Iterator[Any]:
    """Yield a client of a server that runs in the body."""
    app = make_app(make_service(store, **settings))
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def other(client: Any) -> dict[str, dict[str, str]]:
    """Return what sends a request with the other key."""
    return {"headers": {"Authorization": f"Bearer {OTHER_KEY}"}}


def wait_until_read(client: Any, memory: str, status: str = "ready") -> dict[str, Any]:
    """Return a memory once nothing is read into it any more."""
    while (found := client.get(f"/v1/memories/{memory}").json())["status"] == "reading":
        time.sleep(0.01)
    assert found["status"] == status, found
    return found


def new_memory(client: Any, text: str = TEXT * 5, **fields: Any) -> dict[str, Any]:
    """Return a memory that has read a text."""
    answer = client.post("/v1/memories", json={"text": text} | fields)
    assert answer.status_code == 201, answer.text
    return wait_until_read(client, answer.json()["id"])


def complete(client: Any, prompt: str = "The pass key is", **fields: Any) -> Any:
    """Return the response to a completion, greedy and of 6 tokens."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0} | fields
    return client.post("/v1/completions", json=body)


def chat(client: Any, *turns: str, **fields: Any) -> Any:
    """Return the response to a chat, whose turns are the user's and the assistant's in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    body = {"model": "tiny", "messages": messages, "max_tokens": 6, "temperature": 0} | fields
    return client.post("/v1/chat/completions", json=body)


def text_of(response: Any) -> str:
    """Return the text of an answer."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def files_of(store: Path) -> list[str]:
    """Return the names of the files in a store that are a memory's."""
    return sorted(path.name for path in store.rglob("*") if path.is_file() and path.name != ".lock")
