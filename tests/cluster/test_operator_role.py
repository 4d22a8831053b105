"""What the operator's service account may ask of the API server at all."""

from __future__ import annotations

import json

import pytest
from kube import Kubectl, Object, Refused

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    "asked",
    [
        "get secrets",
        "list secrets",
        "watch secrets",
        "get secrets/tributary-store",
        "create pods",
        "patch pods",
        "get pods --subresource=log",
        "create pods --subresource=exec",
        "get pods --subresource=exec",
        "create pods --subresource=attach",
        "create pods --subresource=ephemeralcontainers",
        "create pods --subresource=portforward",
        "patch jobs.batch",
        "update jobs.batch",
        "create cronjobs.batch",
        "create deployments.apps",
        "create daemonsets.apps",
        "create statefulsets.apps",
        "create serviceaccounts --subresource=token",
        "create rolebindings.rbac.authorization.k8s.io",
        "create federatedclients.tributary.dev",
        "patch federatedclients.tributary.dev",
        "delete federatedclients.tributary.dev",
        "get configmaps",
        "delete services --subresource=proxy",
        "use federatedclients.tributary.dev/unwilling",
    ],
)
def test_the_operators_role_has_nothing_else(operator: Kubectl, tenant: str, asked: str) -> None:
    verb, resource, *flags = asked.split()
    with pytest.raises(Refused, match="no"):
        operator("auth", "can-i", verb, resource, f"--namespace={tenant}", *flags)


def test_the_operator_cannot_read_a_secret(operator: Kubectl, tenant: str) -> None:
    with pytest.raises(Refused, match="forbidden"):
        operator("get", "secret", "tributary-store", "-n", tenant)


@pytest.mark.parametrize(
    "resource", ["jobs.batch", "pods", "services", "secrets", "events", "namespaces", "nodes"]
)
def test_there_is_no_cluster_wide_read_beyond_our_kinds(operator: Kubectl, resource: str) -> None:
    with pytest.raises(Refused, match="forbidden"):
        operator("get", resource, "--all-namespaces")


def test_our_kinds_are_readable_everywhere_and_the_namespace_of_a_tenant_by_name(
    operator: Kubectl, tenant: str
) -> None:
    operator("get", "fclient,fround,mrel", "--all-namespaces")
    assert operator.get("namespace", tenant)["metadata"]["labels"]


def test_the_operator_may_report_but_not_rewrite(installed: Kubectl, operator: Kubectl, tenant: str) -> None:
    status = {"status": {"privacy": {"spentEpsilon": "1"}}}
    operator(
        "patch",
        "fclient/notes",
        "-n",
        tenant,
        "--subresource=status",
        "--type=merge",
        f"-p={json.dumps(status)}",
    )
    suspend = {"spec": {"suspend": True}}
    with pytest.raises(Refused, match="forbidden"):
        operator("patch", "fclient/notes", "-n", tenant, "--type=merge", f"-p={json.dumps(suspend)}")


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({"spec": {"suspend": True}}, "does not change specs"),
        ({"metadata": {"labels": {"role": "owner"}}}, "does not change labels"),
    ],
)
def test_the_operator_keeps_a_finalizer_on_a_round_and_changes_nothing_else(
    installed: Kubectl, operator: Kubectl, namespace: str, patch: Object, reason: str
) -> None:
    digest = "sha256:" + "a" * 64
    installed.apply(
        {
            "apiVersion": "tributary.dev/v1alpha1",
            "kind": "FederatedRound",
            "metadata": {"name": "r1", "namespace": namespace},
            "spec": {
                "baseModel": {"uri": "s3://tributary/models/a", "digest": digest},
                "clients": {},
                "method": {"lora": {}},
                "training": {"maxSteps": 5, "expectedBatchSize": 64, "learningRate": "1e-3"},
                "privacy": {"epsilon": "2", "delta": "1e-6"},
            },
        }
    )
    command = ["patch", "fround/r1", "-n", namespace, "--type=merge"]
    for finalizers in (["tributary.dev/children"], []):
        operator(*command, f"-p={json.dumps({'metadata': {'finalizers': finalizers}})}")
    with pytest.raises(Refused, match=reason):
        operator(*command, f"-p={json.dumps(patch)}")
