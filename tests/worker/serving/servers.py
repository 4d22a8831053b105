"""A real server on a free port, in a thread, for a tiny model."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tributary_worker.serving.metrics import Metrics
from tributary_worker.serving.naming import RELEASE_HEADER
from tributary_worker.serving.server import DrainingServer
from tributary_worker.serving.service import Service

RELEASE, REVISION = "assistant", "r1"
WAIT_SECONDS_MAX = 60.0


@dataclass
class Running:
    server: DrainingServer
    service: Service
    client: httpx.Client
    thread: threading.Thread
    port: int

    def complete(self, **request: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": "a", **request})

    def pieces(self, **request: Any) -> list[dict[str, Any]]:
        """The events of a streamed completion, without the last, which must be [DONE]."""
        events = self.complete(stream=True, **request).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@contextmanager
def running(
    load: Callable[[], Any], *, grace_seconds: float = 0.5, finish_seconds: float = 2, **service: Any
) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = Service(RELEASE, REVISION, 4096, Metrics(RELEASE, REVISION), **service)
    server = DrainingServer(
        served,
        load,
        host="127.0.0.1",
        port=port,
        grace_seconds=grace_seconds,
        finish_seconds=finish_seconds,
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_SECONDS_MAX) as client:
        client.event_hooks["response"] = [_names_its_release]
        try:
            wait_until(lambda: server.started)
            yield Running(server, served, client, thread, port)
        finally:
            server.should_exit = True
            thread.join(WAIT_SECONDS_MAX)
            assert not thread.is_alive()


def _names_its_release(response: httpx.Response) -> None:
    assert response.headers[RELEASE_HEADER] == f"{RELEASE}/{REVISION}", response


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
