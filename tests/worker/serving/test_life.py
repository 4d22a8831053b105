"""From loading to draining: ready only with a model that has answered, and gone only when all is answered."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import tiny_models
import torch
from worker.serving.servers import running, wait_until

from tributary_api.failures import Reason
from tributary_api.shared import TaskKind
from tributary_worker.compression.loading import load_model
from tributary_worker.failures import StageFailure
from tributary_worker.serving.generation import GenerationError


def test_not_ready_before_the_model_has_answered(talker):
    gate = threading.Event()

    def load():
        gate.wait(20)
        return talker

    with running(load) as server:
        assert server.client.get("/healthz").status_code == 200
        ready = server.client.get("/readyz")
        assert (ready.status_code, ready.text) == (503, "loading\n")
        refused = server.complete()
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
        gate.set()
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert server.complete(max_tokens=2).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server():
    failure = StageFailure(Reason.MODEL_MISSING, "there is no such model")

    def load():
        raise failure

    with running(load) as server:
        server.thread.join(60)
        assert not server.thread.is_alive()
    assert server.server.failure is failure


def test_a_model_that_cannot_answer_ends_the_server(tmp_path):
    model = tiny_models.llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    loaded = load_model(tiny_models.save(model, tmp_path), TaskKind.CAUSAL_LM)
    with running(lambda: loaded) as server:
        server.thread.join(60)
        assert not server.thread.is_alive()
    assert isinstance(server.server.failure, GenerationError)


def test_draining_accepts_for_a_while_and_finishes_what_is_open(talker):
    with running(lambda: talker, grace_seconds=2, finish_seconds=60) as server:
        wait_until(lambda: server.service.is_ready)
        body = {"prompt": "a", "max_tokens": 2000, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.drain()
            ready = server.client.get("/readyz")
            assert (ready.status_code, ready.text) == (503, "draining\n")
            time.sleep(0.5)  # the server looks every 0.1 s whether it is time to close
            late = server.complete(max_tokens=2)
            assert (late.status_code, late.headers["connection"]) == (200, "close")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.thread.join(60)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            server.complete()


def test_draining_does_not_wait_for_ever(talker):
    with running(lambda: talker, finish_seconds=1) as server:
        wait_until(lambda: server.service.is_ready)
        body = {"prompt": "a", "max_tokens": 4000, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.server.drain()
            server.thread.join(60)
            assert not server.thread.is_alive()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)


def test_sigterm_ends_a_process_cleanly_without_a_lost_request(tmp_path):
    directory = tiny_models.save(tiny_models.llama(max_position_embeddings=4096), tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(__file__).with_name("serve_directory.py")
    process = subprocess.Popen(
        [sys.executable, program, directory, str(port)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )
    try:
        statuses, refused = _ask_until_closed(process, f"http://127.0.0.1:{port}")
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert set(statuses) == {200}
    assert len(statuses) > 20
    assert refused, "the port closed in the end"


def _ask_until_closed(process, url):
    """Statuses of requests one after the other, a SIGTERM among them, until nobody accepts a connection."""
    wait_for_ready(process, url)
    statuses, terminated = [], False
    with httpx.Client(base_url=url, timeout=20) as client:
        while True:
            try:
                response = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
            except httpx.ConnectError:
                return statuses, terminated
            statuses.append(response.status_code)
            if len(statuses) == 20:
                process.send_signal(signal.SIGTERM)
                terminated = True


def wait_for_ready(process, url):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def test_a_model_that_breaks_is_a_server_error(tmp_path):
    directory = tiny_models.save(tiny_models.llama(), tmp_path / "model")
    loaded = load_model(directory, TaskKind.CAUSAL_LM)
    with running(lambda: loaded) as server:
        wait_until(lambda: server.service.is_ready)
        loaded.model.model.norm.weight.fill_(float("nan"))
        response = server.complete()
        assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
        (event,) = server.complete(stream=True).text.strip().split("\n\n")
        assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.client.get("/healthz").status_code == 200
