"""A tenant's namespace as a training pod sees it, without a cluster: real S3, a TLS API server, the pod's
mounts in a directory, and the pod itself as a process."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import training_worlds as worlds
from api_servers import CLIENT_PATH, api_server

from tributary_api.client import FederatedClient
from tributary_api.shared import StoreEndpoint
from tributary_api.tasks import NOISE_KEY_PATH, TASK_ENV, TrainTask
from tributary_dev.s3 import S3Server
from tributary_store import bundle
from tributary_store.keys import Layout
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

    def run(self, **changes: Any) -> subprocess.CompletedProcess[str]:
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


@contextmanager
def tenant_namespace(
    s3: S3Server,
    root: Path,
    lines: Sequence[str] | None = None,
    *,
    endpoint: str | None = None,
    bucket: str | None = None,
) -> Iterator[Namespace]:
    """Base model, data and a reservation in a bucket of its own; key, token and certificate below `root`.

    The pod reaches the store at `endpoint`, by default directly.
    """
    bucket = bucket or f"tenant-{secrets.token_hex(6)}"
    s3.create_bucket(bucket)
    address = StoreEndpoint(endpoint=endpoint or s3.endpoint_for_host, region=s3.region)
    direct = StoreEndpoint(endpoint=s3.endpoint_for_host, region=s3.region)
    store = ObjectStore.open(direct, s3.access_key, s3.secret_key)
    model = tiny_models.save(tiny_models.llama(width=16), root / "model")
    ref = bundle.push(store, model, f"s3://{bucket}/models/")
    text = "\n".join(worlds.records(60) if lines is None else lines)
    store.put_new(f"s3://{bucket}/notes/part.jsonl", text.encode(errors="surrogateescape"))
    data = worlds.client_object().spec.data.to_json_object() | {"uri": f"s3://{bucket}/notes/"}
    privacy = worlds.client_object().spec.privacy.to_json_object() | {"ledgerUri": f"s3://{bucket}/ledger/"}
    client = worlds.client_object(data=data, privacy=privacy, store=address.to_json_object())
    task = worlds.train_task(ref, client, store=address.to_json_object(), **_places(bucket))
    worlds.World(store, client, task).reserve()
    key = root / NOISE_KEY_PATH.removeprefix("/")
    key.parent.mkdir(parents=True)
    key.write_bytes(worlds.TENANT_KEY)
    with api_server(root / SERVICE_ACCOUNT_PATH.removeprefix("/")) as (api, answers):
        answers[CLIENT_PATH] = (200, json.dumps(client.to_json_object()).encode())
        environment = api | {
            ACCESS_KEY: s3.access_key,
            SECRET_KEY: s3.secret_key,
            TERMINATION_MESSAGE_PATH_ENV: str(root / "termination-log"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
        }
        yield Namespace(root, store, client, task, environment)


def _places(bucket: str) -> dict[str, str]:
    """Where a task's delta and manifest belong."""
    layout = Layout(bucket)
    return {
        "deltaUri": layout.delta(worlds.CLIENT, worlds.RUN_KEY),
        "manifestUri": layout.delta_manifest(worlds.CLIENT, worlds.RUN_KEY),
    }
