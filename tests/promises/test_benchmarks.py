"""The benchmarks at small sizes: whether they run, what their rows carry, and what they do without a peer or memory."""

import builtins
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import counts, efficiency, overhead, peers, prefill, serving, state, training_dtype
from benchmarks.models import converted, random_tokens
from benchmarks.placement import Placement
from benchmarks.report import slope, write_report
from benchmarks.servers import Streamed

EVERY_ROW = {"task", "figure", "threads", "torch", "transformers", "schema", "version", "git_commit", "machine"}
runner = CliRunner()


@pytest.mark.parametrize(
    "question", [pytest.param(one, marks=pytest.mark.slow) for one in (state, overhead, efficiency, training_dtype)]
)
def test_rows_carry_median_spread_and_where_they_come_from(question: Any) -> None:
    """Catches a figure without its spread, or one that cannot be distinguished from another machine's."""
    rows = list(question.run("random_8m", repeats=3, quick=True))
    assert rows
    for row in rows:
        assert row.keys() >= EVERY_ROW | {"block_size", "fam_length", "num_memory_segments", "num_tokens"}
        medians = [name.removesuffix("_median") for name in row if name.endswith("_median")]
        assert medians
        for name in medians:
            assert 0 < row[f"{name}_min"] <= row[f"{name}_median"] <= row[f"{name}_max"]


@torch.no_grad()
@pytest.mark.parametrize("num_memory_segments", [0, 2])
def test_calls_and_bytes_per_block_do_not_grow(num_memory_segments: int) -> None:
    """Catches work, or memory, that every block adds to later ones."""
    fields = {"block_size": 16, "fam_length": 4, "num_memory_segments": num_memory_segments}
    reader = converted("random_8m", **fields)
    state = reader.init_state()
    found = []
    for block_idx in range(40):
        with counts.OperatorCount() as count:
            reader.read(random_tokens("random_8m", 16, seed=block_idx), state)
        found.append((count.num_calls, count.num_bytes))
    assert found[0][0] > 100
    assert len(set(found[num_memory_segments + 1 :])) == 1, found


def test_counts_tell_a_block_from_a_token_and_a_step() -> None:
    """Catches counting that misses the backward pass, or counts nothing."""
    rows = {(r["system"], r["num_memory_segments"]): r for r in counts.run("random_8m", quick=True)}
    assert len(rows) == 7
    for measure in ("num_calls", "bytes_made"):
        token, first, block = (rows[system, 0][measure] for system in ("token", "first_token", "block"))
        assert 0 < token < first <= block < rows["training_step", 0][measure] / 4


def test_prefill_skips_what_would_take_too_long_or_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cell that is killed for memory or runs for hours instead of being predicted."""
    system = prefill.build("random_8m", "full")
    assert prefill.why_skipped(system, 1024, flops_per_second=1e11) is None
    assert "predicted to take" in str(prefill.why_skipped(system, 262144, flops_per_second=1e9))
    monkeypatch.setattr(Placement, "available_bytes", lambda self: 100_000_000)
    assert "predicted to need" in str(prefill.why_skipped(system, 262144, flops_per_second=None))
    assert prefill.why_skipped(prefill.build("random_8m", "fam"), 262144, flops_per_second=None) is None


def test_missing_peer_says_how_to_install_it_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that ends because one peer is not there."""
    real_import = builtins.__import__

    def without_peers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in {module for module, _ in peers.PEERS.values()}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peers)
    rows = list(peers.run("random_8m", repeats=1, quick=True))
    skipped = {row["system"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped.keys() == peers.PEERS.keys()
    for package, reason in skipped.items():
        assert f"pip install {package}" in reason
    assert [row["system"] for row in rows if "skipped" not in row] == ["fam", "fam without logits"]


@pytest.mark.slow
def test_command_writes_rows_and_report(tmp_path: Path) -> None:
    """Catches rows that are lost, and a report that does not show them."""
    output = tmp_path / "rows.jsonl"
    options = ["state", "--model", "random_8m", "--quick", "--output", str(output)]
    result = runner.invoke(command.app, options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["figure"] for row in rows} == {"state"}
    assert "seconds_fork" in output.with_suffix(".md").read_text()


def test_unknown_question_names_the_known_ones() -> None:
    result = runner.invoke(command.app, ["speed"])
    assert result.exit_code == 2
    assert "overhead" in result.output


def test_lengths_are_refused_where_there_are_none() -> None:
    """Catches lengths that are dropped in silence."""
    result = runner.invoke(command.app, ["state", "--tokens", "1024"])
    assert result.exit_code == 2
    assert "state has no lengths" in result.output
    result = runner.invoke(command.app, ["prefill", "--tokens", "1k"])
    assert result.exit_code == 2
    assert "whole numbers" in result.output


def test_report_plots_prefill_with_its_slope(tmp_path: Path) -> None:
    """Catches a slope of another line than that through the logarithms."""
    assert slope([1, 10, 100], [2, 20, 200]) == pytest.approx(1)
    assert slope([1, 10, 100], [1, 100, 10000]) == pytest.approx(2)
    shared = {
        "task": "benchmark",
        "machine": "m",
        "threads": 1,
        "torch": "t",
        "transformers": "t",
        "model": "random_8m",
        "figure": "prefill",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    **shared,
                    "system": "fam",
                    "num_tokens": n,
                    "seconds_median": n / 4,
                    "seconds_min": 1,
                    "bytes_peak": 1000,
                    "seconds_max": 9,
                }
            )
            + "\n"
            for n in (1024, 2048)
        )
        + json.dumps({**shared, "system": "full", "num_tokens": 2048, "skipped": "predicted to take 700 s"})
        + "\n"
    )
    written = list(write_report(path))
    assert [p.name for p in written] == [
        "rows_prefill_time_random_8m.svg",
        "rows_prefill_memory_random_8m.svg",
        "rows.md",
    ]
    page = written[-1].read_text()
    assert "to the power 1.00" in page
    assert "predicted to take 700 s" in page


class FakeServer:
    """What `soak` needs of a server; `lost` memories are gone after a restart, `failing` appends fail."""

    def __init__(self, lost: int = 0, failing: bool = False) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.lost, self.failing = lost, failing
        self.process = SimpleNamespace(send_signal=self._kill, wait=lambda: None)
        self.model = "tiny"

    def _kill(self, _: Any) -> None:
        for memory in list(self.kept)[: self.lost]:
            del self.kept[memory]

    @contextlib.contextmanager
    def running(self, *_: Any) -> Iterator["FakeServer"]:
        yield self

    def bytes_resident(self) -> int:
        return 1_000_000

    def read(self, text: str) -> dict[str, Any]:
        memory = {"id": f"m{len(self.kept)}-{random.random()}", "num_tokens_read": len(text), "bytes": 10}
        self.kept[memory["id"]] = memory | {"text": text}
        return memory

    def post(self, path: str, text: str = "") -> dict[str, Any]:
        _, _, memory, what = path.split("/")
        if what == "fork":
            copy = self.read(self.kept[memory]["text"])["id"]
            self.kept[copy]["num_tokens_read"] = self.kept[memory]["num_tokens_read"]
            return self.kept[copy]
        if self.failing:
            raise RuntimeError("no room")
        self.kept[memory]["num_tokens_read"] += len(text)
        return self.kept[memory]

    def wait_until_read(self, memory: str) -> dict[str, Any]:
        return self.kept[memory]

    def delete(self, memory: str) -> None:
        del self.kept[memory]

    def memories(self) -> dict[str, dict[str, Any]]:
        return dict(self.kept)


@pytest.mark.parametrize(("lost", "failing"), [(0, False), (3, False), (0, True)])
def test_soak_counts_what_a_server_lost(
    lost: int, failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a soak that says 0 whatever the server does."""
    server = FakeServer(lost, failing)
    monkeypatch.setattr(serving, "fam_serve", server.running)
    monkeypatch.setattr(serving, "_metrics", lambda _: {"fam_ram_state_bytes": 20.0, "fam_ram_states": 2.0})
    monkeypatch.setattr(serving, "ask", lambda server, _, __, memory: Streamed([0.1, 0.3], server.kept[memory]["text"]))
    soak, density = serving.soak("tiny", tmp_path / "store", num_memories=8, seconds=0.2, clients=3)
    assert (soak["lost"], soak["errors"] > 0) == (lost, failing), soak
    assert soak["keys_right"] == 1.0
    assert soak["seconds_between_tokens_p95"] == pytest.approx(0.2)
    assert density["memories_per_gb_ram"] == 100_000_000


@pytest.mark.slow
def test_serving_is_measured_on_a_real_server() -> None:
    """Catches a benchmark that the server no longer answers."""
    rows = {row["figure"]: row for row in serving.run("tiny", quick=True)}
    assert set(rows) == {"serving_restart", "serving_streams", "serving_soak", "serving_density"}
    assert (rows["serving_soak"]["errors"], rows["serving_soak"]["lost"]) == (0, 0)
    assert rows["serving_streams"]["tokens_per_second"] > 0
