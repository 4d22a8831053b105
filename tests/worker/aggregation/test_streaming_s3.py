"""The stage as its pod runs it, on a real S3 server: memory that does not grow, and nothing left behind."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from aggregation_worlds import FULL, LAYOUT, RUN_KEY, client, delta_manifest, grant_digest
from s3_servers import s3_server
from signers import OWNER_KEY

from tributary_api.records import AggregateManifest
from tributary_api.shared import StoreEndpoint
from tributary_api.tasks import TASK_ENV, AggregateTask
from tributary_store import bundle
from tributary_store.objectstore import ObjectStore
from tributary_store.tensors import encode_header
from tributary_worker.failures import TERMINATION_MESSAGE_PATH_ENV

pytestmark = pytest.mark.cluster

MIB = 1 << 20
TENSOR_MIB = 24
"""No multiple of a chunk: blocks end in the middle of tensors."""
PEAK_MIB_MAX = 512
MEASURED = (
    "import resource, subprocess, sys\n"
    "code = subprocess.run([sys.executable, '-m', 'tributary_worker', 'aggregate']).returncode\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)\n"
    "sys.exit(code)\n"
)
"""Runs the stage and prints its peak of resident memory, in MiB."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        running.create_bucket("exchange")
        yield running


def write_model(directory, tensors, seed):
    """A model of `tensors` tensors of 24 MiB; gives the path of its weights."""
    random = np.random.default_rng(seed)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shapes = {f"model.layers.{i:02d}.weight": ("F32", (TENSOR_MIB << 8, 1 << 10)) for i in range(tensors)}
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write(encode_header(shapes, {}))
        for _ in range(tensors):
            file.write((0.01 * random.standard_normal(TENSOR_MIB << 18, np.float32)).tobytes())
    return path


def prepared(server, tmp_path, tensors, clients, **aggregation):
    """Base model and deltas in the store; all clients send the same values, from one upload each."""
    endpoint = StoreEndpoint(endpoint=server.endpoint_for_host)
    store = ObjectStore.open(endpoint, server.access_key, server.secret_key)
    write_model(tmp_path / "base", tensors, 1)
    base = bundle.push(store, tmp_path / "base", LAYOUT.models)
    path = write_model(tmp_path / "delta", tensors, 2)
    values = np.memmap(path, "<f4", mode="r", offset=path.stat().st_size - tensors * TENSOR_MIB * MIB)
    norm = float(np.sqrt(sum(np.square(part, dtype=np.float64).sum() for part in np.array_split(values, 64))))
    uri = f"s3://exchange/clients/all/{tmp_path.name}.safetensors"
    file = store.upload_new(uri, path)
    deltas = []
    for name in "abcdefghijklmnop"[:clients]:
        manifest = delta_manifest(name, base, file).model_copy(update={"l2_norm": norm, "signature": None})
        manifest_uri = f"s3://exchange/clients/{name}/{tmp_path.name}.json"
        store.put_new(manifest_uri, OWNER_KEY.signed(manifest).canonical_json())
        deltas.append(
            {
                "client": client(name).to_json_object(),
                "deltaUri": uri,
                "manifestUri": manifest_uri,
                "grantDigest": grant_digest(name),
                "receiptKey": OWNER_KEY.public,
                "weight": 1.0,
            }
        )
    task = {
        "runKey": RUN_KEY,
        "round": {"namespace": "hub", "name": "round-1"},
        "baseModel": base.to_json_object(),
        "method": FULL,
        "aggregation": aggregation,
        "deltas": deltas,
        "quorum": clients,
        "store": {"endpoint": server.endpoint_for_host},
        "modelsUri": LAYOUT.models,
        "manifestUri": f"s3://exchange/rounds/{tmp_path.name}/aggregate/manifest.json",
    }
    return store, AggregateTask.model_validate(task)


def peak_mib(server, task, tmp_path):
    env = {
        **os.environ,
        TASK_ENV: task.model_dump_json(by_alias=True, exclude_none=True),
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        TERMINATION_MESSAGE_PATH_ENV: str(tmp_path / "message"),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env=env, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("aggregation", [{}, {"strategy": "Median"}], ids=["FedAvg", "Median"])
def test_memory_grows_neither_with_the_model_nor_with_the_clients(server, tmp_path, aggregation):
    """The larger set is twelve times the smaller one, and five times its limit."""
    peaks = {}
    for tensors, clients in ((3, 3), (9, 12)):
        directory = tmp_path / f"{tmp_path.name}-{tensors}x{clients}"
        directory.mkdir()
        store, task = prepared(server, directory, tensors, clients, **aggregation)
        peaks[tensors, clients] = peak_mib(server, task, directory)
        manifest = AggregateManifest.model_validate_json(store.get(task.manifest_uri))
        size = tensors * TENSOR_MIB * MIB
        assert len(manifest.included) == clients
        # Every byte is read once, and those chunks twice in which a block ends in the base model.
        assert size * (clients + 1) < manifest.bytes_read < 1.1 * size * (clients + 1)
    assert max(peaks.values()) < PEAK_MIB_MAX
    assert peaks[9, 12] < 1.35 * peaks[3, 3]


def test_what_a_killed_pod_left_at_the_server_is_removed(server, tmp_path):
    store, task = prepared(server, tmp_path, 2, 2)
    env = {
        **os.environ,
        TASK_ENV: task.model_dump_json(by_alias=True, exclude_none=True),
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        TERMINATION_MESSAGE_PATH_ENV: str(tmp_path / "message"),
        "TMPDIR": str(tmp_path),
    }
    uploads = server.client().list_multipart_uploads
    process = subprocess.Popen([sys.executable, "-m", "tributary_worker", "aggregate"], env=env)
    while process.poll() is None and not uploads(Bucket="exchange").get("Uploads"):
        pass
    process.kill()
    process.wait()
    left = uploads(Bucket="exchange").get("Uploads", [])
    assert left, "the stage ended before it could be killed"
    peak_mib(server, task, tmp_path)
    assert not uploads(Bucket="exchange").get("Uploads")
    manifest = AggregateManifest.model_validate_json(store.get(task.manifest_uri))
    bundle.pull(store, manifest.model, tmp_path / "new")
