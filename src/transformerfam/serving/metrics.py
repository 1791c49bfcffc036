"""What `/metrics` counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from transformerfam.serving.engine import Engine
from transformerfam.serving.memories import Memories

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters of one server.

    Args:
        engine: whose tokens and queues are counted.
        memories: whose number and bytes are counted.
    """

    def __init__(self, engine: Engine, memories: Memories) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self._requests = Counter("fam_requests", "Requests", labels, registry=self._registry)
        self._seconds = Histogram(
            "fam_request_seconds",
            "Seconds to the end of an answer",
            ("path",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "fam_first_token_seconds", "Seconds to an answer's first token", buckets=SECONDS, registry=self._registry
        )
        cache = memories.cache
        for name, text, read in (
            ("fam_memories", "Memories in the store", lambda: len(memories)),
            ("fam_ram_states", "States in RAM", lambda: len(cache)),
            ("fam_ram_state_bytes", "Bytes of states in RAM", lambda: cache.num_bytes),
            ("fam_ram_hits", "States that were in RAM when they were needed", lambda: cache.num_hits),
            ("fam_ram_misses", "States that were not", lambda: cache.num_misses),
            ("fam_generated_tokens", "Tokens of answers", lambda: engine.num_generated),
            ("fam_read_tokens", "Tokens of prompts and texts", lambda: engine.num_read),
            ("fam_open_answers", "Answers that wait or are generated", lambda: engine.counts()["open_answers"]),
            ("fam_batch_size", "Answers in the batch", lambda: engine.counts()["generating"]),
            ("fam_open_readings", "Texts that are being read", lambda: engine.counts()["open_readings"]),
        ):
            gauge = Gauge(name, text, registry=self._registry)
            gauge.set_function(read)

    def note_request(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request by the template of its path."""
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def note_first_token(self, seconds: float) -> None:
        """Count how long an answer's first token took."""
        self._first.observe(seconds)

    def text(self) -> Any:
        """Return all of it in Prometheus' format."""
        return generate_latest(self._registry)
