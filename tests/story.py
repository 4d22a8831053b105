"""The embedded cluster with real pods, the operator, and four data owners with an S3 identity each."""

from __future__ import annotations

import json
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from installation import BUCKET, SYSTEM, client_values, operator_values
from kube import CHARTS, ROOT, Kubectl, Object, run

from docstrings_demo import corpus
from tributary_api.base import sha256_of
from tributary_api.meta import NamespacedName
from tributary_api.shared import StoreEndpoint
from tributary_dev import cluster as dev
from tributary_store import bundle
from tributary_store.keys import Layout
from tributary_store.objectstore import ObjectStore
from tributary_store.policies import ClientIdentity, HubIdentities, data_policy, exchange_policy

CLIENT = "notes"
NUM_EXAMPLES = 200
LEDGER = "s3://{bucket}/ledger/{owner}/notes/"

MEMORY = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "3Gi"}}
OWNERS: dict[str, Object] = {
    "north": {"resources": MEMORY},
    "south": {"resources": MEMORY, "nodes": 2},
    "silent": {"resources": MEMORY},  # has uploaded nothing
    "hungry": {"resources": {**MEMORY, "limits": {"memory": "256Mi"}}},  # torch alone needs more
}
GOOD = ("north", "south")

TINY_MODEL = """
import sys; sys.path.insert(0, "tests")
import pathlib, tiny_models
tiny_models.save(tiny_models.llama(seed=1), pathlib.Path(sys.argv[1]))
"""


@dataclass(frozen=True)
class Story:
    """What the tests talk to."""

    kubectl: Kubectl
    store: ObjectStore
    base_model: Object
    dataset: Object


def build(model_directory: Path) -> Story:
    """Install everything anew; takes minutes when the images are not loaded yet."""
    cluster = dev.up(fresh=True)
    images = dev.ensure_images(cluster, ("worker", "operator"))
    kubectl = Kubectl(cluster.bin / "kubectl", cluster.kubeconfig)
    endpoint = StoreEndpoint(endpoint=cluster.s3.endpoint_for_host, region=cluster.s3.region)
    store = ObjectStore.open(endpoint, cluster.s3.access_key, cluster.s3.secret_key)
    keys = create_identities(cluster)
    install_operator(cluster, images, keys)
    for owner in OWNERS:
        install_owner(cluster, owner, images["worker"], keys[owner])
    dataset = upload_documents(cluster, store, keys)
    return Story(kubectl, store, push_tiny_model(store, model_directory), dataset)


def create_identities(cluster: dev.Cluster) -> dict[str, tuple[str, str]]:
    keys = {name: (name, secrets.token_hex(16)) for name in (*OWNERS, "operator", "aggregator", "serving")}
    for key in keys.values():
        cluster.s3.create_user(*key)
    cluster.s3.create_bucket(BUCKET, object_lock=True)
    clients = [
        ClientIdentity(
            NamespacedName(namespace=owner, name=CLIENT), owner, LEDGER.format(bucket=BUCKET, owner=owner)
        )
        for owner in OWNERS
    ]
    cluster.s3.put_policy(
        BUCKET, exchange_policy(Layout(BUCKET), HubIdentities("operator", "aggregator", "serving"), clients)
    )
    for owner in OWNERS:
        cluster.s3.create_bucket(f"{owner}-data")
        cluster.s3.put_policy(f"{owner}-data", data_policy(f"{owner}-data", owner))
    return keys


def install_operator(cluster: dev.Cluster, images: dict[str, str], keys: dict[str, tuple[str, str]]) -> None:
    values = operator_values(
        image=images["operator"],
        workerImage=images["worker"],
        store={
            "bucket": BUCKET,
            "endpoint": cluster.s3.endpoint_for_pods,
            "credentials": {part: secret(keys[part]) for part in ("operator", "aggregator", "serving")},
        },
        hubJobs={"resources": MEMORY},
        tuning={"pollSeconds": 2},
    )
    helm(cluster, "tributary", "tributary", values)


def install_owner(cluster: dev.Cluster, owner: str, image: str, key: tuple[str, str]) -> None:
    values = client_values(CLIENT)
    values["namespace"] = {"name": owner, "create": True, "labels": {"story": "yes"}}
    values["operator"] = {"namespace": SYSTEM}
    values["credentials"] = secret(key)
    values["networkPolicy"] = {"egressPorts": [443, 6443, urlsplit(cluster.s3.endpoint_for_pods).port]}
    spec = values["client"]["spec"]
    spec["data"] |= {"uri": f"s3://{owner}-data/private/", "numExamples": NUM_EXAMPLES}
    spec["store"] |= {"endpoint": cluster.s3.endpoint_for_pods}
    spec["privacy"] |= {
        "budget": {"epsilon": "9", "delta": "1e-5"},
        "maxRoundEpsilon": "8",
        "ledgerUri": LEDGER.format(bucket=BUCKET, owner=owner),
    }
    spec["worker"] = {**OWNERS[owner], "allowedImages": [image]}
    helm(cluster, "tributary-client", f"{owner}-{CLIENT}", values)


def helm(cluster: dev.Cluster, chart: str, release: str, values: Object) -> None:
    command = [str(cluster.bin / "helm"), f"--kubeconfig={cluster.kubeconfig}", "upgrade", "--install"]
    options = [f"--namespace={SYSTEM}", "--create-namespace", "--wait", "--timeout=110s", "-f-"]
    run([*command, release, str(CHARTS / chart), *options], stdin=json.dumps(values))


def secret(key: tuple[str, str]) -> Object:
    return {"accessKeyId": key[0], "secretAccessKey": key[1]}


def upload_documents(cluster: dev.Cluster, store: ObjectStore, keys: dict[str, tuple[str, str]]) -> Object:
    """Each good owner's text with its own key; the next documents are public. Returns the public data set."""
    texts = corpus.packages(["pydantic", "hypothesis", "botocore"])
    lines = [json.dumps({"text": text}) for text in texts]
    endpoint = StoreEndpoint(endpoint=cluster.s3.endpoint_for_host, region=cluster.s3.region)
    for n, owner in enumerate(GOOD):
        mine = [*lines[n * 300 : n * 300 + 300], "this line is no JSON: it contributes nothing"]
        own_store = ObjectStore.open(endpoint, *keys[owner])
        own_store.put_new(f"s3://{owner}-data/private/documents.jsonl", "\n".join(mine).encode())
    public = "\n".join(lines[600:680]).encode()
    uri = f"s3://{BUCKET}/datasets/public.jsonl"
    store.put_new(uri, public)
    return {"uri": uri, "digest": sha256_of(public)}


def push_tiny_model(store: ObjectStore, directory: Path) -> Object:
    python = ROOT / ".venv-worker" / "bin" / "python"
    subprocess.run([python, "-c", TINY_MODEL, directory], cwd=ROOT, check=True, timeout=120)
    return bundle.push(store, directory, Layout(BUCKET).models).to_json_object()
