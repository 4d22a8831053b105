"""The charts as tests install them: their values, and the objects that Helm makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from kube import CHARTS, PINNED, Object, run

SYSTEM = "tributary-system"
HUB = "hub"
BUCKET = "tributary"
OPERATOR = f"system:serviceaccount:{SYSTEM}:tributary-operator"
OPERATOR_IMAGE = f"localhost/tributary-operator{PINNED}"
WORKER_IMAGE = f"localhost/tributary-worker{PINNED}"

OF_RELEASE_NAMESPACE = {"Deployment", "Service", "ServiceAccount", "NetworkPolicy", "Secret"}
"""Kinds of which Helm leaves the namespace open when it is the release's."""


def operator_values(**changes: object) -> Object:
    """Valid values of charts/tributary."""
    return {
        "image": OPERATOR_IMAGE,
        "workerImage": WORKER_IMAGE,
        "hubNamespaces": [HUB],
        "createHubNamespaces": True,
        "store": {"bucket": BUCKET, "endpoint": "http://s3.example:9000"},
        **changes,
    }


def client_values(name: str = "notes", **changes: object) -> Object:
    """Valid values of charts/tributary-client."""
    return {
        "client": {
            "name": name,
            "labels": {"role": "owner"},
            "spec": {
                "data": {"name": name, "uri": f"s3://clinic-a/{name}/", "numExamples": 20000},
                "store": {"credentialsSecret": "tributary-store"},
                "consent": {"hubs": [{"namespace": HUB}], "expires": "2030-06-30T00:00:00Z"},
                "privacy": {
                    "budget": {"epsilon": "8", "delta": "1e-6"},
                    "maxRoundEpsilon": "2",
                    "ledgerUri": f"s3://{BUCKET}/ledger/clinic-a/{name}/",
                },
                "worker": {"nodes": 2, "allowedImages": [WORKER_IMAGE]},
            },
        },
        "credentials": {"accessKeyId": "key", "secretAccessKey": "secret"},
        **changes,
    }


def rendered(helm: Path, chart: str, namespace: str, values: Object) -> list[Object]:
    """The objects of a chart, each with its namespace; raises Refused with Helm's words."""
    # As JSON: PyYAML writes the string "1e-6" without quotes, and YAML 1.2 reads a number.
    command = [str(helm), "template", "test", str(CHARTS / chart), f"--namespace={namespace}", "-f-"]
    objects = [found for found in yaml.safe_load_all(run(command, stdin=json.dumps(values))) if found]
    for found in objects:
        if found["kind"] in OF_RELEASE_NAMESPACE:
            found["metadata"].setdefault("namespace", namespace)
    return objects
