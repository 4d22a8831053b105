"""The cluster of standing_cluster.py, and a tenant in it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from forged_jobs import in_container, train_job
from installation import OPERATOR, client_values, rendered
from kube import PINNED, Kubectl, Object, eventually
from standing_cluster import admin, helm, installed, running

__all__ = ["admin", "helm", "installed", "running"]


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


@pytest.fixture(scope="module")
def tenant(installed: Kubectl, helm: Path, namespace: str) -> str:
    """A namespace whose owner has applied charts/tributary-client for the client `notes`."""
    installed.apply(*rendered(helm, "tributary-client", namespace, client_values()))
    installed.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "registry-password", "namespace": namespace},
            "stringData": {"AWS_ACCESS_KEY_ID": "of another program"},
        },
        {**_client_beside(namespace), "metadata": {"name": "unwilling", "namespace": namespace}},
    )
    evil = train_job(namespace)
    in_container(image=f"localhost/evil{PINNED}")(evil)
    eventually(
        lambda: installed.impersonate(OPERATOR).is_refused(evil, "is not in spec.worker.allowedImages")
    )
    return namespace


def _client_beside(namespace: str) -> Object:
    """A FederatedClient whose owner has not bound the operator's role for it."""
    spec = client_values("unwilling")["client"]["spec"]
    return {"apiVersion": "tributary.dev/v1alpha1", "kind": "FederatedClient", "spec": spec}
