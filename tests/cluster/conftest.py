"""A real API server and S3 with the CRDs, roles and policies of the chart, but no node and no operator.

It is a cluster of its own beside the one of `make demo`, so that neither disturbs the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import yaml
from kube import CHARTS, PINNED, Kubectl, Object, run

from tributary_dev import cluster as dev
from tributary_dev import places

SYSTEM = "tributary-system"
HUB = "hub"
BUCKET = "tributary"
OPERATOR = f"system:serviceaccount:{SYSTEM}:tributary-operator"
WORKER_IMAGE = f"localhost/tributary-worker{PINNED}"


@pytest.fixture(scope="session")
def running() -> dev.Cluster:
    return dev.up(nodes=0, identity=f"{places.checkout()} tests")


@pytest.fixture(scope="session")
def admin(running: dev.Cluster) -> Kubectl:
    """kubectl as the cluster's admin."""
    return Kubectl(running.bin / "kubectl", running.kubeconfig)


@pytest.fixture(scope="session")
def helm(running: dev.Cluster) -> str:
    return str(running.bin / "helm")


def rendered(helm: str, chart: str, namespace: str, *flags: str, stdin: str | None = None) -> list[Object]:
    """The objects of a chart, without Helm's own record of a release, so that tests can run in any order."""
    command = [helm, "template", "test", str(CHARTS / chart), f"--namespace={namespace}", *flags]
    objects = [found for found in yaml.safe_load_all(run(command, stdin=stdin)) if found]
    for found in objects:
        if found["kind"] in NAMESPACED:
            found["metadata"].setdefault("namespace", namespace)
    return objects


NAMESPACED = {"Deployment", "Service", "ServiceAccount", "NetworkPolicy", "Secret"}


@pytest.fixture(scope="session")
def installed(admin: Kubectl, helm: str, running: dev.Cluster) -> Kubectl:
    """The chart of the operator is applied, all but the operator's Deployment. The hub namespace exists."""
    values = {
        "image": f"localhost/tributary-operator{PINNED}",
        "workerImage": WORKER_IMAGE,
        "hubNamespaces": [HUB],
        "createHubNamespaces": True,
        "store": {"bucket": BUCKET, "endpoint": running.s3.endpoint_for_pods},
    }
    objects = rendered(helm, "tributary", SYSTEM, "-f-", stdin=yaml.safe_dump(values))
    admin.namespace(SYSTEM)
    # Kinds must exist before objects of them, and namespaces before what is in them.
    admin.apply(*(o for o in objects if o["kind"] in {"CustomResourceDefinition", "Namespace"}))
    admin("wait", "--for=condition=Established", "crd", "-l=!nothing", "--timeout=30s")
    admin.apply(
        *(o for o in objects if o["kind"] not in {"CustomResourceDefinition", "Namespace", "Deployment"})
    )
    running.s3.create_bucket(BUCKET)
    return admin


@pytest.fixture
def operator(installed: Kubectl) -> Kubectl:
    """kubectl in the name of the operator's service account."""
    return installed.impersonate(OPERATOR)


@pytest.fixture(scope="module")
def namespace(installed: Kubectl) -> Iterator[str]:
    """An empty namespace for one test file."""
    name = installed.namespace(f"test-{secrets.token_hex(4)}")
    yield name
    installed("delete", "namespace", name, "--wait=false")
