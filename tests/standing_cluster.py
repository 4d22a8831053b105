"""A cluster without nodes and the operator's chart in it, as fixtures: real API server, controllers and S3.

It is a cluster of its own beside the one of `make demo`, so that neither disturbs the other.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from installation import BUCKET, HUB, OPERATOR, SYSTEM, operator_values, rendered
from kube import Kubectl, Object, eventually

from tributary_dev import cluster as dev
from tributary_dev import places

SUITE_VARIABLE = "TRIBUTARY_TEST_CLUSTER"
"""Another name gives a run its own cluster: two operators in one would undo each other's work."""

FIRST = {"CustomResourceDefinition", "Namespace"}
"""Must exist before objects of these kinds, or in these namespaces."""


@pytest.fixture(scope="session")
def running() -> dev.Cluster:
    return dev.up(nodes=0, identity=f"{places.checkout()} {os.environ.get(SUITE_VARIABLE, 'tests')}")


@pytest.fixture(scope="session")
def admin(running: dev.Cluster) -> Kubectl:
    """kubectl as the cluster's admin."""
    return Kubectl(running.bin / "kubectl", running.kubeconfig)


@pytest.fixture(scope="session")
def helm(running: dev.Cluster) -> Path:
    return running.bin / "helm"


@pytest.fixture(scope="session")
def installed(admin: Kubectl, helm: Path, running: dev.Cluster) -> Kubectl:
    """The operator's chart is applied, all but its Deployment. The hub namespace and the bucket exist."""
    store = {"bucket": BUCKET, "endpoint": running.s3.endpoint_for_pods}
    objects = rendered(helm, "tributary", SYSTEM, operator_values(store=store))
    admin.namespace(SYSTEM)
    admin.apply(*(o for o in objects if o["kind"] in FIRST))
    admin("wait", "--for=condition=Established", "crd", "-l=!nothing", "--timeout=30s")
    admin.apply(*(o for o in objects if o["kind"] not in FIRST | {"Deployment"}))
    running.s3.create_bucket(BUCKET)
    eventually(lambda: admin.impersonate(OPERATOR).is_refused(_job_of_another_image(), "chart's workerImage"))
    return admin


def _job_of_another_image() -> Object:
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "localhost/another"}]}
    metadata = {"generateName": "another-", "namespace": HUB}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"template": {"spec": pod}},
    }
