"""compress, gate, evaluate and serve as their pods run them: processes, on a real store, with own rights."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import tiny_models
from s3_servers import s3_server

from tributary_api.base import sha256_of
from tributary_api.failures import EXIT_CODES, Reason, TerminationMessage
from tributary_api.records import CompressionManifest, EvaluationReport, GateVerdict
from tributary_api.release import CompressionStep, Gate, GateMetric, QuantizationScheme, Quantize
from tributary_api.shared import DatasetRef, StoreEndpoint, TaskKind
from tributary_api.tasks import TASK_ENV, CompressTask, EvaluateTask, GateTask, ScoredModel, ServeTask
from tributary_store import bundle
from tributary_store.keys import Layout
from tributary_store.objectstore import ObjectStore
from tributary_store.policies import HubIdentities, exchange_policy
from tributary_worker.failures import TERMINATION_MESSAGE_PATH_ENV

pytestmark = pytest.mark.cluster

LAYOUT = Layout("exchange")
HUB = HubIdentities("operator", "aggregator", "serving")
SECRET = "a-secret-of-a-test"
LM = TaskKind.CAUSAL_LM
DATASET = f"{LAYOUT.datasets}public.jsonl"
TEXTS = b"\n".join(json.dumps({"text": f"public text number {i} of twenty"}).encode() for i in range(20))


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket(LAYOUT.bucket, object_lock=True)
        for user in (HUB.operator, HUB.aggregator, HUB.serving):
            server.create_user(user, SECRET)
        policy = exchange_policy(LAYOUT, HUB, [])
        server.client().put_bucket_policy(Bucket=LAYOUT.bucket, Policy=policy)
        yield server


@pytest.fixture(scope="module")
def endpoint(s3):
    return StoreEndpoint(endpoint=s3.endpoint_for_host, region=s3.region)


@pytest.fixture(scope="module")
def store(s3, endpoint):
    return ObjectStore.open(endpoint, s3.access_key, s3.secret_key)


@pytest.fixture(scope="module")
def parent(store, tmp_path_factory):
    store.put_new(DATASET, TEXTS)
    directory = tiny_models.save(tiny_models.llama(width=256), tmp_path_factory.mktemp("parent"))
    return bundle.push(store, directory, LAYOUT.models)


@pytest.fixture
def start(tmp_path):
    """Starts a stage as its pod does: the task and one identity in the environment, no home to write to."""
    processes = []

    def start(stage, task, identity):
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HOME": "/nonexistent",
            "TMPDIR": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "AWS_ACCESS_KEY_ID": identity,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            TASK_ENV: task.canonical_json().decode(),
            TERMINATION_MESSAGE_PATH_ENV: str(tmp_path / "termination"),
        }
        command = [sys.executable, "-m", "tributary_worker", stage]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def run(start, *stage):
    """(exit code, lines of the log) of a stage that ends by itself."""
    process = start(*stage)
    output, _ = process.communicate(timeout=240)
    return process.returncode, [json.loads(line) for line in output.splitlines()]


def compress_task(endpoint, parent):
    return CompressTask(
        task=LM,
        model=parent,
        steps=[CompressionStep(quantize=Quantize(scheme=QuantizationScheme.INT8))],
        store=endpoint,
        releases_uri=LAYOUT.releases,
        manifest_uri=LAYOUT.compression_manifest("key"),
    )


def dataset():
    return DatasetRef(uri=DATASET, digest=sha256_of(TEXTS))


def test_from_a_model_to_a_release_in_service(start, store, endpoint, parent):
    status, log = run(start, "compress", compress_task(endpoint, parent), HUB.serving)
    manifest = CompressionManifest.model_validate_json(store.get(LAYOUT.compression_manifest("key")))
    assert (status, log[-1]["event"], log[-1]["bytes"]) == (0, "compressed", manifest.bytes)
    assert manifest.bytes <= 0.35 * manifest.parent_bytes

    verdict_uri = LAYOUT.gate_verdict("key")
    gate = GateTask(
        task=LM,
        candidate=manifest.model,
        parent=parent,
        gate=Gate(dataset=dataset(), metrics=[GateMetric(margin="0.02")]),
        store=endpoint,
        verdict_uri=verdict_uri,
    )
    status, log = run(start, "gate", gate, HUB.serving)
    verdict = GateVerdict.model_validate_json(store.get(verdict_uri))
    assert (status, log[-1]["verdict"], verdict.verdict) == (0, "PASS", "PASS")
    _serve(start, endpoint, manifest.model)


def _serve(start, endpoint, model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    task = ServeTask(
        task=LM,
        model=model,
        release="assistant",
        revision="r1",
        max_sequence_length=64,
        drain_timeout_seconds=2,
        store=endpoint,
        port=port,
    )
    process = start("serve", task, HUB.serving)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        _wait_for_ready(client, process)
        response = client.post("/v1/completions", json={"prompt": "public", "max_tokens": 8})
    assert (response.status_code, response.headers["x-tributary-release"]) == (200, "assistant/r1")
    assert response.json()["usage"]["prompt_tokens"] == len("public")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert [json.loads(line)["event"] for line in output.splitlines()] == ["serving", "drained"]


def _wait_for_ready(client, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready; the process's status is {process.poll()}")


def test_the_aggregator_evaluates(start, store, endpoint, parent):
    task = EvaluateTask(
        task=LM,
        models=[ScoredModel(role="baseline", model=parent), ScoredModel(role="new", model=parent)],
        dataset=dataset(),
        store=endpoint,
        report_uri=LAYOUT.evaluation("key"),
    )
    status, _ = run(start, "evaluate", task, HUB.aggregator)
    report = EvaluationReport.model_validate_json(store.get(task.report_uri))
    assert status == 0
    assert report.scores[0].loss == report.scores[1].loss
    assert report.scores[0].documents == 20


def run_in_vain(start, task, identity, tmp_path):
    """(exit code, termination message) of a compression that writes no manifest."""
    task = task.model_copy(update={"manifest_uri": LAYOUT.compression_manifest("other")})
    status, _ = run(start, "compress", task, identity)
    return status, TerminationMessage.model_validate_json((tmp_path / "termination").read_bytes())


def test_a_denied_store_reaches_the_operator(start, tmp_path, endpoint, parent):
    status, message = run_in_vain(start, compress_task(endpoint, parent), HUB.operator, tmp_path)
    assert (status, message.reason) == (EXIT_CODES[Reason.STORE_DENIED], Reason.STORE_DENIED)
    assert not message.retryable


def test_an_unreachable_store_reaches_the_operator(start, tmp_path, parent):
    nowhere = StoreEndpoint(endpoint="http://127.0.0.1:9")
    status, message = run_in_vain(start, compress_task(nowhere, parent), HUB.serving, tmp_path)
    assert (status, message.reason) == (EXIT_CODES[Reason.STORE_UNREACHABLE], Reason.STORE_UNREACHABLE)
    assert message.retryable
