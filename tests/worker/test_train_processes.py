"""`python -m tributary_worker train` as a pod runs it: real S3, a TLS API server, one or two processes."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import training_worlds as worlds
from api_servers import CLIENT_PATH, api_server
from s3_servers import s3_server
from safetensors.torch import load

from tributary_api.client import FederatedClient
from tributary_api.failures import EXIT_CODES, Reason
from tributary_api.shared import StoreEndpoint
from tributary_api.tasks import NOISE_KEY_PATH, TASK_ENV, TrainTask
from tributary_store import bundle
from tributary_store.keys import Layout
from tributary_store.objects import bucket_and_key
from tributary_store.objectstore import ObjectStore
from tributary_worker.consent import SERVICE_ACCOUNT_PATH
from tributary_worker.distributed import RankLayout
from tributary_worker.failures import TERMINATION_MESSAGE_PATH_ENV
from tributary_worker.store_access import ACCESS_KEY, SECRET_KEY

SECONDS_MAX = 240
RANK_VARIABLES = RankLayout(0, 0, 1, 1, "", 0).environment.keys()


@dataclass(frozen=True)
class Namespace:
    """A tenant's namespace, as far as a training pod sees it."""

    root: Path
    store: ObjectStore
    client: FederatedClient
    task: TrainTask
    environment: dict[str, str]

    def run(self, **changes) -> subprocess.CompletedProcess[str]:
        task = self.task.model_copy(update=changes)
        command = [sys.executable, "-m", "tributary_worker", "train", "--root", str(self.root)]
        # This process may be a rank itself, by the fixture `alone`; a pod is not.
        inherited = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
        environment = inherited | self.environment | {TASK_ENV: task.model_dump_json(by_alias=True)}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
        )

    @property
    def termination_message(self) -> dict[str, object]:
        return json.loads((self.root / "termination-log").read_text())


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def namespace(s3, tmp_path):
    """Base model, data and a reservation in S3; key, token and certificate below `root`."""
    bucket = f"tenant-{secrets.token_hex(6)}"
    s3.create_bucket(bucket)
    endpoint = StoreEndpoint(endpoint=s3.endpoint_for_host, region=s3.region)
    store = ObjectStore.open(endpoint, s3.access_key, s3.secret_key)
    model = tiny_models.save(tiny_models.llama(width=16), tmp_path / "model")
    ref = bundle.push(store, model, f"s3://{bucket}/models/")
    store.put_new(f"s3://{bucket}/notes/part.jsonl", "\n".join(worlds.records(60)).encode())
    data = worlds.client_object().spec.data.to_json_object() | {"uri": f"s3://{bucket}/notes/"}
    privacy = worlds.client_object().spec.privacy.to_json_object() | {"ledgerUri": f"s3://{bucket}/ledger/"}
    client = worlds.client_object(data=data, privacy=privacy, store=endpoint.to_json_object())
    task = worlds.train_task(ref, client, store=endpoint.to_json_object(), **places(bucket))
    worlds.World(store, client, task).reserve()
    key = tmp_path / NOISE_KEY_PATH.removeprefix("/")
    key.parent.mkdir(parents=True)
    key.write_bytes(worlds.TENANT_KEY)
    with api_server(tmp_path / SERVICE_ACCOUNT_PATH.removeprefix("/")) as (api, answers):
        answers[CLIENT_PATH] = (200, json.dumps(client.to_json_object()).encode())
        environment = api | {
            ACCESS_KEY: s3.access_key,
            SECRET_KEY: s3.secret_key,
            TERMINATION_MESSAGE_PATH_ENV: str(tmp_path / "termination-log"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
        }
        yield Namespace(tmp_path, store, client, task, environment)


def places(bucket):
    """Where a task's delta and manifest belong."""
    layout = Layout(bucket)
    return {
        "deltaUri": layout.delta(worlds.CLIENT, worlds.RUN_KEY),
        "manifestUri": layout.delta_manifest(worlds.CLIENT, worlds.RUN_KEY),
    }


STEPS = [{"step": t, "steps": worlds.STEPS} for t in (1, 2, 3)]
PRIVATE_WORDS = ("loss", "norm=", "grad_norm", "skipped", "lr=", "says")
"""What DeepSpeed and others like to print, and a word of every record."""


def test_two_processes_train_what_one_does_and_nothing_private_is_printed(namespace, s3):
    one = namespace.run()
    assert one.returncode == 0, one.stderr
    delta = load(namespace.store.get(namespace.task.delta_uri))
    for uri in (namespace.task.delta_uri, namespace.task.manifest_uri):
        bucket, key = bucket_and_key(uri)
        s3.client().delete_object(Bucket=bucket, Key=key)  # else the second would adopt the first's
    two = namespace.run(processes_per_node=2)
    assert two.returncode == 0, two.stderr
    again = load(namespace.store.get(namespace.task.delta_uri))
    assert all(delta[name].allclose(again[name], rtol=1e-4, atol=1e-5) for name in delta)
    for ended in (one, two):
        assert [json.loads(line) for line in ended.stdout.splitlines()] == STEPS
        assert not [word for word in PRIVATE_WORDS if word in ended.stderr.lower()]


def test_all_processes_end_when_consent_is_refused(namespace):
    grant = namespace.task.grant.model_copy(update={"hub_namespace": "another"})
    ended = namespace.run(processes_per_node=2, grant=grant)
    assert ended.returncode == EXIT_CODES[Reason.CONSENT_REFUSED]
    assert namespace.termination_message["reason"] == Reason.CONSENT_REFUSED
    assert "hub another" in str(namespace.termination_message["message"])
    assert ended.stdout == ""
