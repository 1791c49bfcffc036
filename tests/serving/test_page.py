"""The page of a server, without a browser: its files, their headers, and the numbers that it shows."""

import re
from pathlib import Path
from typing import Any

import pytest
from served import KEY, make_service, served
from starlette.testclient import TestClient
from tiny_families import make_tiny

from transformerfam import FamConfig, convert
from transformerfam.serving.app import make_app
from transformerfam.serving.facts import facts_of
from transformerfam.serving.routes_page import FOLDER
from transformerfam.tools.costs import full_cache_bytes

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
OWN = [name for name in FILES if not name.startswith("lit/") and name.endswith((".js", ".html", ".css", ".svg"))]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client without a key."""
    with TestClient(make_app(make_service(tmp_path_factory.mktemp("store")))) as client:
        yield client


@pytest.mark.parametrize("path", ["", *(f"page/{name}" for name in FILES)])
def test_page_needs_no_key_and_may_load_nothing_from_elsewhere(stranger: Any, path: str) -> None:
    """Catches a file that a browser without a key does not get, and one without the policy that keeps it at home."""
    answer = stranger.get(f"/{path}")
    assert answer.status_code == stranger.head(f"/{path}").status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert (policy["frame-ancestors"], policy["base-uri"], policy["object-src"]) == ("'none'", "'none'", "'none'")
    assert policy["require-trusted-types-for"] == "'script'"
    assert not any("unsafe" in value or "http" in value or "*" in value for value in policy.values())
    assert answer.headers["x-content-type-options"] == "nosniff"
    if path.endswith(".js"):
        assert answer.headers["content-type"].startswith("text/javascript")


def test_page_opens_nothing_else(stranger: Any) -> None:
    """Catches files of the server, or the API, that come without a key with the page."""
    for path in ("/page/%2e%2e/routes_page.py", "/page/nothing.js", "/page/"):
        assert stranger.get(path).status_code == 404, path
    assert stranger.get("/v1/models").status_code == 401
    assert stranger.post("/page/app.js").status_code == 401
    assert stranger.post("/v1/memories/mem_1/attention", json={}).status_code == 401


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_the_page_names_another_address(name: str) -> None:
    """Catches a script, a font or a picture of another server, which needs a network and tells who looks."""
    found = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[^\s\"'<>)]*", (FOLDER / name).read_text(encoding="utf-8"))
    assert [address for address in found if address != "http://www.w3.org/2000/svg"] == []


@pytest.mark.parametrize("name", OWN)
def test_page_makes_no_markup_of_text(name: str) -> None:
    """Catches a name or an answer that becomes markup, and a script or a style that the policy stops."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "unsafe",
        "localStorage",
        "cookie",
    ):
        assert word not in text
    if name.endswith(".html"):
        assert re.findall(r"<script[^>]*>[^<]+|style=|\son\w+=", text) == []
    if name.endswith(".js"):
        assert re.findall(r"\sstyle=\$?[\"{]|\son\w+=[\"$]", text) == []


def test_files_of_the_page_are_all_there() -> None:
    """Catches an import, or a file that the page names, which is not served."""
    for name in OWN:
        text = (FOLDER / name).read_text(encoding="utf-8")
        for target in re.findall(r"from \"(\./[^\"]+)\"", text):
            assert (FOLDER / name).parent.joinpath(target).is_file(), target
        for target in re.findall(r"(?:src|href)=\"(page/[^\"]+)\"", text):
            assert (FOLDER.parent / target).is_file(), target
    notice = (FOLDER / "lit" / "NOTICE").read_text(encoding="utf-8")
    for path in (FOLDER / "lit").rglob("*.js"):
        assert path.relative_to(FOLDER / "lit").as_posix() in notice


def test_file_that_has_not_changed_is_not_sent_again(stranger: Any) -> None:
    """Catches a page that is loaded whole at every visit, or never again after an update."""
    first = stranger.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = stranger.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_models_say_what_a_memory_and_a_cache_take(tmp_path: Path) -> None:
    """Catches a flat line that is not the state's bytes, and a growing one that is not the cache's."""
    with served(tmp_path) as client:
        (facts,) = client.get("/v1/models").json()["data"]
        model = client.app.state.service.engine.model
        assert facts == client.get(f"/v1/models/{facts['id']}").json()
    assert facts["memory"]["state_bytes"] == model.init_state().num_bytes
    assert (facts["memory"]["block_size"], facts["memory"]["fam_length"]) == (8, 2)
    assert (facts["has_chat"], facts["max_tokens"]) == (True, 4096)
    assert KEY not in str(facts)
    assert cache_bytes(facts, 1000) == full_cache_bytes(model, 1000, model.dtype) > 0


def cache_bytes(facts: dict[str, Any], num_tokens: int) -> int:
    """Return what the page makes of the facts; `cacheBytes` in chart.js."""
    groups = facts["kv_cache"]
    return sum(group["bytes_per_token"] * min(num_tokens, group["window"] or num_tokens) for group in groups)


def test_cache_of_layers_with_a_window_ends_to_grow(tmp_path: Path) -> None:
    """Catches a cache of local layers that is drawn as growing with the text, and one of global layers that is not."""
    service = make_service(tmp_path)
    service.engine.model = model = convert(make_tiny("gemma3_text"), FamConfig(block_size=8, fam_length=2))
    facts = facts_of(service)
    windows = [group["window"] for group in facts["kv_cache"]]
    assert None in windows
    assert len(windows) == 2
    for num_tokens in (1, 5, 10_000):
        assert cache_bytes(facts, num_tokens) == full_cache_bytes(model, num_tokens, model.dtype)
    assert facts["memory"]["state_bytes"] == model.init_state().num_bytes
