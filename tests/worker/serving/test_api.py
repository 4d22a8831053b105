"""The HTTP API over a real connection: answers, streams, limits, errors, the release on every response."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from worker.serving.servers import RELEASE, REVISION, running, wait_until

from tributary_worker.serving.generation import Sampling, generate
from tributary_worker.serving.naming import RELEASE_HEADER


@pytest.fixture(scope="module")
def live(talker):
    with running(lambda: talker) as server:
        wait_until(lambda: server.service.is_ready)
        yield server


def generations(server):
    return server.service._generations


def greedy(talker, prompt, tokens):
    ids = talker.tokenizer(prompt).input_ids
    return "".join(piece.text for piece in generate(talker, ids, Sampling(tokens, temperature=0)))


def test_the_model_is_listed(live):
    (model,) = live.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == (RELEASE, "model")


@pytest.mark.parametrize("prompt", ["Hello", ["Hello"], [40, 70, 77, 77, 80]])
def test_a_completion(live, talker, prompt):
    response = live.complete(model=RELEASE, prompt=prompt, max_tokens=20, temperature=0)
    assert response.status_code == 200
    body = response.json()
    ids = talker.tokenizer("Hello").input_ids if prompt != [40, 70, 77, 77, 80] else prompt
    expected = "".join(piece.text for piece in generate(talker, ids, Sampling(20, temperature=0)))
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected, "length")
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25}
    assert (body["object"], body["model"]) == ("text_completion", RELEASE)


def test_a_stream_adds_up_to_the_completion(live, talker):
    pieces = live.pieces(prompt="Hello", max_tokens=20, temperature=0)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == greedy(talker, "Hello", 20)
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert len({piece["id"] for piece in pieces}) == 1


def test_a_stream_comes_while_it_is_made(live):
    with live.client.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 400, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        began = time.monotonic()
        times = [time.monotonic() - began for line in response.iter_lines() if line]
    assert times[0] < 0.5 * times[-1]


def test_the_same_seed_gives_the_same_text(live):
    def text(seed):
        return live.complete(max_tokens=20, seed=seed).json()["choices"][0]["text"]

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(4)}) > 1


def test_stop_strings_end_the_text(live, talker):
    whole = greedy(talker, "a", 20)
    choice = live.complete(max_tokens=20, temperature=0, stop=[whole[4:6]]).json()["choices"][0]
    assert choice["text"] == whole[: whole.index(whole[4:6])]
    assert choice["finish_reason"] == "stop"


def test_an_empty_prompt_begins_a_text(live):
    assert live.complete(prompt="", max_tokens=3).json()["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("request_", "status", "param"),
    [
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": [257]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"model": "another"}, 404, "model"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 4096}, 400, "max_tokens"),
        ({"max_tokens": "9"}, 400, "max_tokens"),
        ({"prompt": "x" * 5000}, 400, "prompt"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 2}, 400, "n"),
        ({"best_of": 2}, 400, "best_of"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"seed": 2**64}, 400, "seed"),
        ({"logprobs": 3}, 400, "logprobs"),
        ({"echo": True}, 400, "echo"),
    ],
)
def test_bad_requests_name_the_field(live, request_, status, param):
    response = live.complete(**request_)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert param in error["message"] or "model" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 100_000])
def test_what_is_not_a_json_object_is_a_bad_request(live, body):
    response = live.client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_half_a_surrogate_pair_is_a_bad_request(live):
    response = live.client.post("/v1/completions", content=b'{"prompt": "\\ud800"}')
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def in_parts():
    for _ in range(40):
        yield b" " * 2**16


@pytest.mark.parametrize("body", [b" " * 2**21, in_parts()], ids=["declared", "chunked"])
def test_a_long_body_is_refused(live, body):
    response = live.client.post("/v1/completions", content=body)
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("PUT", "/x/y", 404)],
)
def test_other_routes_are_errors_of_the_same_shape(live, method, path, status):
    response = live.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_even_what_is_not_http_is_told_the_release(live):
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(b"this is not HTTP\r\n\r\n")
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 400")
    assert f"{RELEASE_HEADER}: {RELEASE}/{REVISION}" in answer


def test_metrics_count_requests_and_tokens(live):
    def sample(page, start):
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(start))

    place = f'release="{RELEASE}",revision="{REVISION}"'
    answered = f'tributary_requests_total{{code="200",{place},route="/v1/completions"}}'
    generated = f'tributary_tokens_total{{kind="generated",{place}}}'
    before = live.client.get("/metrics").text
    live.complete(max_tokens=7)
    live.client.get("/no/such/path")
    after = live.client.get("/metrics").text
    assert sample(after, answered) == sample(before, answered) + 1
    assert sample(after, generated) == sample(before, generated) + 7
    assert "/no/such/path" not in after
    assert sample(after, "tributary_ready") == 1


def test_other_routes_answer_while_tokens_are_made(live):
    body = {"prompt": "a", "max_tokens": 1500, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()  # the connection closes when nobody holds this
        next(lines)
        assert [live.client.get("/healthz").status_code for _ in range(5)] == [200] * 5
        assert generations(live).open > 0


def test_a_client_that_leaves_frees_its_place(live):
    wait_until(lambda: generations(live).open == 0)
    body = {"prompt": "a", "max_tokens": 4000, "stream": True}
    with live.client.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
    live.complete(max_tokens=1)
    left = time.monotonic()
    wait_until(lambda: generations(live).open == 0)
    # 4000 tokens take longer than the request in between even on a busy machine.
    assert time.monotonic() - left < 2


def test_too_many_requests_are_told_to_come_back(talker):
    with running(lambda: talker, open_max=2) as server:
        wait_until(lambda: server.service.is_ready)
        body = {"prompt": "a", "max_tokens": 2000, "stream": True}
        with (
            server.client.stream("POST", "/v1/completions", json=body),
            server.client.stream("POST", "/v1/completions", json=body),
        ):
            response = server.complete(max_tokens=1)
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        wait_until(lambda: generations(server).open == 0)
        assert server.complete(max_tokens=1).status_code == 200


def test_many_at_once_are_all_answered(live):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: live.complete(max_tokens=10, seed=seed % 4), range(48)))
    assert {answer.status_code for answer in answers} == {200}
    texts = [json.loads(answer.text)["choices"][0]["text"] for answer in answers]
    assert all(text == texts[i % 4] for i, text in enumerate(texts))
