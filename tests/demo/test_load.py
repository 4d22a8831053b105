"""The load generator against a real HTTP server: every answer is counted once, and nothing bad is hidden."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from docstrings_demo.load import RELEASE_HEADER, Counters, Sender, await_service, percentile
from docstrings_demo.podtasks import LoadTask


class Server(BaseHTTPRequestHandler):
    """Answers as its `behaviour` says, and counts what it has been asked."""

    protocol_version = "HTTP/1.1"
    behaviour: ClassVar[str] = "good"
    seen: ClassVar[list[str]] = []
    connections: ClassVar[set[tuple[str, int]]] = set()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(json.loads(body)["prompt"])
        self.connections.add(self.client_address)
        if self.behaviour == "hang up":
            self.close_connection = True
            return
        answer = b"{}" if self.behaviour != "no json" else b"oops"
        self.send_response(503 if self.behaviour == "busy" else 200)
        if self.behaviour != "nameless":
            self.send_header(RELEASE_HEADER, "assistant/abc")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def task() -> Iterator[LoadTask]:
    Server.behaviour, Server.seen, Server.connections = "good", [], set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield LoadTask(url=url, model="assistant", connections=1, max_tokens=1, timeout_seconds=5)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("keeps_connection", [True, False])
def test_good_answers_count_for_their_release(task: LoadTask, keeps_connection: bool) -> None:
    counters = Counters()
    sender = Sender(task, counters, keeps_connection=keeps_connection)
    for _ in range(5):
        sender.send("hello")
    assert (counters.sent, counters.failed, dict(counters.per_release)) == (5, 0, {"assistant/abc": 5})
    assert len(Server.connections) == (1 if keeps_connection else 5)


@pytest.mark.parametrize("behaviour", ["busy", "nameless", "no json", "hang up"])
def test_everything_else_has_failed_and_is_not_repeated(task: LoadTask, behaviour: str) -> None:
    counters = Counters()
    sender = Sender(task, counters, keeps_connection=True)
    Server.behaviour = behaviour
    sender.send("bad")
    Server.behaviour = "good"
    sender.send("good")
    assert Server.seen == ["bad", "good"]
    assert (counters.sent, counters.failed) == (2, 1)
    assert len(counters.errors) == 1


def test_a_server_that_is_not_there_is_a_failure(task: LoadTask) -> None:
    counters = Counters()
    nobody = task.model_copy(update={"url": "http://127.0.0.1:1"})
    Sender(nobody, counters, keeps_connection=True).send("hello")
    assert (counters.sent, counters.failed) == (1, 1)


def test_percentiles() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([float(i) for i in range(100)], 0.99) == 99.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


def test_the_load_waits_for_a_service_that_is_about_to_be_there(task: LoadTask) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        late = task.model_copy(update={"url": f"http://127.0.0.1:{reserved.getsockname()[1]}"})
        threading.Timer(0.5, reserved.listen).start()
        await_service(late)
        socket.create_connection(reserved.getsockname(), timeout=1).close()


def test_the_load_does_not_wait_for_ever(task: LoadTask) -> None:
    await_service(task.model_copy(update={"url": "http://127.0.0.1:9", "timeout_seconds": 0.3}))
