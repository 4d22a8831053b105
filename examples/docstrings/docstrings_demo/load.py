"""A load generator: completions without pause, none repeated, every answer counted.

Runs as a Job in the hub's namespace against the release's Service, like any client inside the cluster:
`python -m docstrings_demo.load`. Prints its counters every second, and a last time, marked final, when it is
told to end by SIGTERM.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from urllib.parse import urlsplit

from docstrings_demo.podtasks import LoadTask, read_task, say

RELEASE_HEADER = "x-tributary-release"
PROMPTS = (
    "Return the number of",
    "Compute the matrix",
    "A graph with",
    "The model configuration",
    "Simplify the expression",
    "Raises an error if",
)
LATENCIES_KEPT = 100_000
ERRORS_KEPT = 20


@dataclass
class Counters:
    """What happened so far. All but answers with status 200 and a release's name count as failed."""

    sent: int = 0
    failed: int = 0
    per_release: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    latencies_seconds: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, release: str, seconds: float) -> None:
        with self._lock:
            self.sent += 1
            self.per_release[release] += 1
            if len(self.latencies_seconds) < LATENCIES_KEPT:
                self.latencies_seconds.append(seconds)

    def lost(self, why: str) -> None:
        with self._lock:
            self.sent += 1
            self.failed += 1
            if len(self.errors) < ERRORS_KEPT:
                self.errors.append(why)

    def say(self, *, final: bool = False) -> None:
        with self._lock:
            ordered = sorted(self.latencies_seconds)
            say(
                sent=self.sent,
                failed=self.failed,
                per_release=dict(self.per_release),
                errors=self.errors,
                p50_seconds=percentile(ordered, 0.50),
                p99_seconds=percentile(ordered, 0.99),
                final=final,
            )


def percentile(ordered: list[float], part: float) -> float:
    """Nearest-rank percentile of sorted values; 0 for none."""
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4) if ordered else 0.0


class Sender:
    """One client. It keeps its connection, or opens a new one for each request."""

    def __init__(self, task: LoadTask, counters: Counters, *, keeps_connection: bool) -> None:
        self.task = task
        self.counters = counters
        self.keeps_connection = keeps_connection
        self.connection: http.client.HTTPConnection | None = None

    def send_until(self, end: threading.Event) -> None:
        prompts: Iterator[str] = cycle(PROMPTS)
        while not end.is_set():
            self.send(next(prompts))
        self._close()

    def send(self, prompt: str) -> None:
        started = time.monotonic()
        try:
            status, release = self._complete(prompt)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._close()
            self.counters.lost(f"{type(error).__name__}: {error}")
            return
        if status == http.client.OK and release:
            self.counters.answered(release, time.monotonic() - started)
        else:
            self.counters.lost(f"status {status}, {RELEASE_HEADER} {release!r}")

    def _complete(self, prompt: str) -> tuple[int, str]:
        """Status and release of one completion, read to its end."""
        body = {"model": self.task.model, "prompt": prompt, "max_tokens": self.task.max_tokens}
        connection = self._connected()
        headers = {"content-type": "application/json"}
        if not self.keeps_connection:
            headers["connection"] = "close"
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        json.loads(answer.read())
        if not self.keeps_connection:
            self._close()
        return answer.status, answer.headers.get(RELEASE_HEADER, "")

    def _connected(self) -> http.client.HTTPConnection:
        if self.connection is None:
            address = urlsplit(self.task.url)
            self.connection = http.client.HTTPConnection(
                address.hostname or "", address.port or 80, timeout=self.task.timeout_seconds
            )
        return self.connection

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None


def await_service(task: LoadTask) -> None:
    """Wait until the Service can be connected to from here, but not longer than a request would.

    It was created moments ago, and each node's proxy learns of it in its own time. What fails after that is
    the release's fault, and counts.
    """
    address, deadline = urlsplit(task.url), time.monotonic() + task.timeout_seconds
    while time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection((address.hostname, address.port or 80), timeout=1).close()
            return
        time.sleep(0.1)


def main() -> None:
    task = read_task(LoadTask)
    await_service(task)
    counters, end = Counters(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    senders = [
        threading.Thread(
            target=Sender(task, counters, keeps_connection=i % 2 == 0).send_until, args=(end,), daemon=True
        )
        for i in range(task.connections)
    ]
    for sender in senders:
        sender.start()
    while not end.wait(1.0):
        counters.say()
    for sender in senders:
        sender.join()
    counters.say(final=True)


if __name__ == "__main__":
    main()
