"""charts/tributary-client over its life: what must outlast it, and what must not hold it up."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from installation import client_values
from kube import CHARTS, Kubectl, Refused, eventually, run

pytestmark = pytest.mark.cluster


@pytest.fixture
def tenant(installed: Kubectl) -> Iterator[str]:
    name = installed.namespace(f"tenant-{secrets.token_hex(4)}")
    yield name
    installed("delete", "namespace", name, "--wait=false", "--ignore-not-found")


def install(installed: Kubectl, helm: Path, namespace: str, **changes: object) -> None:
    chart = str(CHARTS / "tributary-client")
    command = [str(helm), f"--kubeconfig={installed.kubeconfig}", f"--namespace={namespace}"]
    command += ["upgrade", "--install", "tributary-client", chart, "-f-"]
    run(command, stdin=json.dumps(client_values("notes", **changes)))


def noise_key(installed: Kubectl, namespace: str) -> str:
    key: str = installed.get("secret", "tributary-noise-key", "-n", namespace)["data"]["key"]
    return key


def test_the_noise_key_outlasts_upgrade_and_uninstall(installed: Kubectl, helm: Path, tenant: str) -> None:
    """With a new key, a round tried again would give a second delta that differs by its noise alone."""
    install(installed, helm, tenant)
    key = noise_key(installed, tenant)
    install(installed, helm, tenant, credentials={"accessKeyId": "new", "secretAccessKey": "new"})
    assert noise_key(installed, tenant) == key
    run([str(helm), f"--kubeconfig={installed.kubeconfig}", f"-n{tenant}", "uninstall", "tributary-client"])
    assert noise_key(installed, tenant) == key
    install(installed, helm, tenant)
    assert noise_key(installed, tenant) == key


def test_a_tenants_namespace_goes_though_the_operator_is_gone(
    installed: Kubectl, helm: Path, tenant: str
) -> None:
    install(installed, helm, tenant)
    installed("delete", "namespace", tenant, "--wait=false")

    def is_gone() -> bool:
        try:
            installed("get", "namespace", tenant)
        except Refused as refused:
            return "not found" in str(refused)
        return False

    eventually(is_gone, timeout_seconds=60)
