"""What the server measures of itself, for Prometheus."""

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from runtime.model import Model
from runtime.serve.scheduler import Scheduler
from runtime.serve.types import FAILURE_STATUS, Callbacks

M = TypeVar("M", Counter, Gauge, Histogram, Info)
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60)
ENDED = {"stop": 200, "length": 200, "cancelled": 499} | FAILURE_STATUS  # how a request ends -> HTTP's status


class Metrics(Callbacks):
    """Metrics of one scheduler, with a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def make(kind: type[M], name: str, what: str, labels: tuple[str, ...] = (), **options: Any) -> M:
            return kind(f"convllava_{name}", what, labels, registry=self.registry, **options)

        self._first = make(
            Histogram, "time_to_first_token_seconds", "From a request's arrival to its first token", buckets=SECONDS
        )
        self._whole = make(
            Histogram,
            "request_seconds",
            "From a request's arrival to the end of its answer",
            buckets=(*SECONDS, 120, 300),
        )
        self._next = make(Histogram, "inter_token_seconds", "Between two tokens of an answer", buckets=SECONDS)
        self._encode = make(Histogram, "encode_seconds", "Of the images that were encoded together", buckets=SECONDS)
        self._occupancy = make(
            Histogram, "batch_occupancy", "Sequences of a decode step", buckets=(1, 2, 4, 8, 16, 32, 64)
        )
        self._tokens = make(Counter, "tokens", "Positions computed, or found in a slot's KV cache", ("kind",))
        self._cache = make(Counter, "image_cache", "Images looked up in the cache of embeds", ("result",))
        self._requests = make(
            Counter, "requests", "Answers that have ended, and requests refused, by how and status", ("finish", "code")
        )
        self._preparing = make(Gauge, "preparing", "Requests whose images are opened and texts tokenized")
        self._waiting = make(Gauge, "queue_depth", "Requests that wait for a slot")
        self._running = make(Gauge, "running", "Requests in a slot")

        self._build = make(Info, "build", "What serves")
        ProcessCollector(registry=self.registry)

    def watch(self, model: Model, scheduler: Scheduler, preparing: Callable[[], int]) -> None:
        """preparing: tells how many requests are being prepared."""
        self._build.info(
            {
                "version": importlib.metadata.version("convllava-deploy"),
                "python": platform.python_version(),
                "model": model.bundle.name,
                "encoder": str(model.encoder_backend),
                "decoder": str(model.decoder_backend),
            }
        )
        self._preparing.set_function(preparing)
        self._waiting.set_function(lambda: scheduler.waiting)
        self._running.set_function(lambda: scheduler.running)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)
        self._tokens.labels("generated").inc()

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)
        self._tokens.labels("generated").inc()

    def step(self, occupancy: int) -> None:
        self._occupancy.observe(occupancy)

    def encoded(self, seconds: float) -> None:
        self._encode.observe(seconds)

    def cache(self, hit: bool) -> None:
        self._cache.labels("hit" if hit else "miss").inc()

    def prefilled(self, fed: int, cached: int) -> None:
        self._tokens.labels("prefilled").inc(fed)
        self._tokens.labels("cached").inc(cached)

    def finished(self, reason: str) -> None:
        self._requests.labels(reason, str(ENDED[reason])).inc()

    def rejected(self, status: int) -> None:
        """A request that the scheduler has not taken."""
        self._requests.labels("cancelled" if status == ENDED["cancelled"] else "rejected", str(status)).inc()

    def answered(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
