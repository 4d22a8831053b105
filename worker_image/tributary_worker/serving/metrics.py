"""What the server counts: nothing of it depends on what a prompt says."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """The metrics of one server, in a registry of its own; each sample carries release and revision."""

    def __init__(self, release: str, revision: str) -> None:
        self._registry = CollectorRegistry()
        self._place = {"release": release, "revision": revision}
        labels = tuple(self._place)
        self._requests = Counter(
            "tributary_requests",
            "Responses by route and status",
            (*labels, "route", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "tributary_request_seconds",
            "Time from a request to the end of its response",
            (*labels, "route"),
            registry=self._registry,
            buckets=SECONDS_BUCKETS,
        )
        self._tokens = Counter(
            "tributary_tokens", "Tokens read and generated", (*labels, "kind"), registry=self._registry
        )
        self.open_generations = Gauge(
            "tributary_open_generations", "Generations running or waiting", labels, registry=self._registry
        ).labels(**self._place)
        self.ready = Gauge(
            "tributary_ready", "1 while the server wants requests", labels, registry=self._registry
        ).labels(**self._place)

    def request(self, route: str, code: int, seconds: float) -> None:
        self._requests.labels(**self._place, route=route, code=str(code)).inc()
        self._seconds.labels(**self._place, route=route).observe(seconds)

    def tokens(self, prompt: int, generated: int) -> None:
        self._tokens.labels(**self._place, kind="prompt").inc(prompt)
        self._tokens.labels(**self._place, kind="generated").inc(generated)

    def page(self) -> bytes:
        return generate_latest(self._registry)
