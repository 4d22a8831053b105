"""What a tampered operator could do with its identity in a data owner's namespace: train, or nothing.

Each way round is tried in the name of the operator's service account, and refused with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from installation import HUB, OPERATOR, WORKER_IMAGE, client_values, rendered
from kube import PINNED, Kubectl, Object, Refused, eventually

from tributary_api.client import WORKER_SERVICE_ACCOUNT
from tributary_api.tasks import NOISE_KEY_PATH, TASK_ENV

pytestmark = pytest.mark.cluster

Change = Callable[[Object], Any]


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


def secret_env(name: str, secret: str) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": "AWS_ACCESS_KEY_ID"}}}


def train_job(namespace: str) -> Object:
    """A training Job as the operator makes them."""
    container = {
        "name": "train",
        "image": WORKER_IMAGE,
        "args": ["train"],
        "env": [
            {"name": TASK_ENV, "value": "{}"},
            {"name": "OMP_NUM_THREADS", "value": "1"},
            secret_env("AWS_ACCESS_KEY_ID", "tributary-store"),
            secret_env("AWS_SECRET_ACCESS_KEY", "tributary-store"),
        ],
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "noise-key", "mountPath": str(Path(NOISE_KEY_PATH).parent), "readOnly": True},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": WORKER_SERVICE_ACCOUNT,
        "automountServiceAccountToken": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "noise-key", "secret": {"secretName": "tributary-noise-key", "items": [KEY_ITEM]}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "generateName": "r1-notes-",
            "namespace": namespace,
            "labels": {"tributary.dev/client": "notes", "tributary.dev/stage": "train"},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimit": 0,
            "activeDeadlineSeconds": 60,
            "ttlSecondsAfterFinished": 60,
            "template": {"metadata": {"labels": {"tributary.dev/stage": "train"}}, "spec": pod},
        },
    }


KEY_ITEM = {"key": "key", "path": "key"}


def pod(job: Object) -> Object:
    found: Object = job["spec"]["template"]["spec"]
    return found


def container(job: Object) -> Object:
    found: Object = pod(job)["containers"][0]
    return found


def volume(source: Object) -> Change:
    return lambda job: pod(job)["volumes"].append({"name": "more", **source})


def env(*variables: Object) -> Change:
    return lambda job: container(job)["env"].extend(variables)


def in_pod(**fields: object) -> Change:
    return lambda job: pod(job).update(fields)


def in_container(**fields: object) -> Change:
    return lambda job: container(job).update(fields)


def insecure(**fields: object) -> Change:
    return lambda job: container(job)["securityContext"].update(fields)


def labelled(client: str) -> Change:
    return lambda job: job["metadata"]["labels"].update({"tributary.dev/client": client})


def projected(secret: str) -> Object:
    return {"projected": {"sources": [{"secret": {"name": secret}}]}}


SECOND = {"name": "second", "image": WORKER_IMAGE}
EXEC = {"exec": {"command": ["sh", "-c", "id"]}}

ONE_CONTAINER = "exactly one container"
ENTRY_POINT = "own entry point must run"
VARIABLES = "environment variables are limited"
VOLUMES = "volumes are limited"
MOUNTS = "never over the image's code"
NAMED_SECRET = "S3 keys must come from the credentialsSecret"
NOISE_KEY = "the only Secret that may be mounted is the noise key"
NODE = "the node's network, processes and ports are out of reach"
POD_CONTEXT = "the pod's security context must be restricted"
CONTEXT = "the container's security context must be restricted"
NO_HOOKS = "no lifecycle hooks and no probes"
NOT_YOURS = "are not the operator's to set"

BYPASSES: dict[str, tuple[Change, str]] = {
    "other image": (in_container(image=f"localhost/evil{PINNED}"), "is not in spec.worker.allowedImages"),
    "image by tag": (
        in_container(image="localhost/tributary-worker:v1"),
        "is not in spec.worker.allowedImages",
    ),
    "command": (in_container(command=["sh"]), ENTRY_POINT),
    "working directory": (in_container(workingDir="/tmp"), ENTRY_POINT),
    "other stage": (in_container(args=["serve"]), "the arguments must be [train]"),
    "more arguments": (in_container(args=["train", "--verbose"]), "the arguments must be [train]"),
    "other account": (in_pod(serviceAccountName="default"), "service account must be tributary-worker"),
    "init container": (in_pod(initContainers=[SECOND]), ONE_CONTAINER),
    "second container": (lambda job: pod(job)["containers"].append(SECOND), ONE_CONTAINER),
    "secret by environment": (
        lambda job: container(job)["env"].__setitem__(
            2, secret_env("AWS_ACCESS_KEY_ID", "registry-password")
        ),
        NAMED_SECRET,
    ),
    "noise key by environment": (
        lambda job: container(job)["env"].__setitem__(
            2, secret_env("AWS_ACCESS_KEY_ID", "tributary-noise-key")
        ),
        NAMED_SECRET,
    ),
    "secret in another variable": (env(secret_env(f"{TASK_ENV}_2", "tributary-store")), VARIABLES),
    "all of a secret": (in_container(envFrom=[{"secretRef": {"name": "registry-password"}}]), VARIABLES),
    "secret volume": (volume({"secret": {"secretName": "registry-password"}}), NOISE_KEY),
    "store keys as volume": (
        volume({"secret": {"secretName": "tributary-store", "items": [KEY_ITEM]}}),
        NOISE_KEY,
    ),
    "whole noise secret": (volume({"secret": {"secretName": "tributary-noise-key"}}), NOISE_KEY),
    "projected secret": (volume(projected("registry-password")), VOLUMES),
    "projected token": (
        volume({"projected": {"sources": [{"serviceAccountToken": {"path": "token", "audience": "s3"}}]}}),
        VOLUMES,
    ),
    "config map": (volume({"configMap": {"name": "kube-root-ca.crt"}}), VOLUMES),
    "host path": (volume({"hostPath": {"path": "/"}}), VOLUMES),
    "other claim": (volume({"persistentVolumeClaim": {"claimName": "database"}}), "the only volume claim"),
    "mount over code": (
        lambda job: container(job)["volumeMounts"].append({"name": "tmp", "mountPath": "/usr/lib/python3"}),
        MOUNTS,
    ),
    "python path": (env({"name": "PYTHONPATH", "value": "/tmp"}), VARIABLES),
    "preload": (env({"name": "LD_PRELOAD", "value": "/tmp/x.so"}), VARIABLES),
    "store override": (env({"name": "AWS_ENDPOINT_URL", "value": "http://evil"}), VARIABLES),
    "termination log elsewhere": (
        env({"name": "TRIBUTARY_TERMINATION_MESSAGE_PATH", "value": "/x"}),
        VARIABLES,
    ),
    "literal key": (
        lambda job: container(job)["env"].__setitem__(2, {"name": "AWS_ACCESS_KEY_ID", "value": "mine"}),
        "S3 keys come from a Secret",
    ),
    "host network": (in_pod(hostNetwork=True), NODE),
    "host processes": (in_pod(hostPID=True), NODE),
    "host port": (in_container(ports=[{"containerPort": 1, "hostPort": 1}]), NODE),
    "privileged": (insecure(privileged=True, allowPrivilegeEscalation=True), CONTEXT),
    "capability": (insecure(capabilities={"drop": ["ALL"], "add": ["SYS_PTRACE"]}), CONTEXT),
    "writable root": (insecure(readOnlyRootFilesystem=False), CONTEXT),
    "root": (insecure(runAsUser=0), CONTEXT),
    "unconfined": (insecure(seccompProfile={"type": "Unconfined"}), CONTEXT),
    "no pod context": (in_pod(securityContext={}), POD_CONTEXT),
    "other name server": (in_pod(dnsConfig={"nameservers": ["192.0.2.1"]}), NOT_YOURS),
    "host alias": (in_pod(hostAliases=[{"ip": "192.0.2.1", "hostnames": ["s3"]}]), NOT_YOURS),
    "node of choice": (in_pod(nodeName="node-1"), NOT_YOURS),
    "hook": (in_container(lifecycle={"postStart": EXEC}), NO_HOOKS),
    "probe": (in_container(livenessProbe=EXEC), NO_HOOKS),
    "no network policy": (
        lambda job: job["spec"]["template"]["metadata"]["labels"].clear(),
        "the owner's network policy selects it",
    ),
    "no client": (
        lambda job: job["metadata"]["labels"].pop("tributary.dev/client"),
        "must name the FederatedClient",
    ),
    "client without consent": (labelled("unwilling"), "does not let the operator use the client unwilling"),
    "client that is not there": (labelled("nobody"), "does not let the operator use the client nobody"),
    "too many pods": (
        lambda job: job["spec"].update(parallelism=3, completions=3),
        "more pods than spec.worker.nodes",
    ),
    "retries": (lambda job: job["spec"].update(backoffLimit=3), "a Job must end by itself"),
    "no deadline": (lambda job: job["spec"].pop("activeDeadlineSeconds"), "a Job must end by itself"),
}


def test_the_training_job_of_the_operator_is_admitted(operator: Kubectl, tenant: str) -> None:
    operator.create(train_job(tenant), "--dry-run=server")


@pytest.mark.parametrize("bypass", BYPASSES)
def test_a_way_round_is_refused_with_its_reason(operator: Kubectl, tenant: str, bypass: str) -> None:
    change, reason = BYPASSES[bypass]
    job = deepcopy(train_job(tenant))
    change(job)
    with pytest.raises(Refused) as refused:
        operator.create(job, "--dry-run=server")
    # By the policy and for this reason; not for a typo in the test or by another check of the API server.
    assert "tributary-tenant-jobs" in str(refused.value)
    assert reason in str(refused.value)


def test_all_clients_of_a_namespace_must_allow_the_image(
    installed: Kubectl, operator: Kubectl, helm: Path, tenant: str
) -> None:
    """Else a second, looser client would open the Secrets of the first one to its image."""
    values = client_values("loose", sharedObjects={"create": False})
    values["client"]["spec"]["worker"]["allowedImages"] = [f"localhost/loose{PINNED}"]
    values["client"]["spec"]["privacy"]["noiseKeySecret"] = "tributary-loose-key"
    objects = [o for o in rendered(helm, "tributary-client", tenant, values) if o["kind"] != "Secret"]
    installed.apply(*objects)
    job = train_job(tenant)
    labelled("loose")(job)
    in_container(image=f"localhost/loose{PINNED}")(job)
    try:
        with pytest.raises(Refused, match=r"is not in spec\.worker\.allowedImages of notes"):
            operator.create(job, "--dry-run=server")
    finally:
        installed("delete", "fclient", "loose", "-n", tenant)


def test_a_namespace_without_a_client_admits_nothing(
    installed: Kubectl, operator: Kubectl, tenant: str
) -> None:
    """Even where a role was left behind."""
    bare = installed.namespace(f"{tenant}-bare")
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "left-behind", "namespace": bare},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [
            {"kind": "ServiceAccount", "name": "tributary-operator", "namespace": "tributary-system"}
        ],
    }
    installed.apply(role)
    try:
        with pytest.raises(Refused, match="no params found"):
            operator.create(train_job(bare), "--dry-run=server")
    finally:
        installed("delete", "namespace", bare, "--wait=false")


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


SERVICE = {"ports": [{"port": 29500}], "selector": {"app": "x"}}


def service(namespace: str, **spec: object) -> Object:
    metadata = {"name": "r1-notes-0", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {**SERVICE, **spec}}


def test_only_headless_services_are_admitted(operator: Kubectl, tenant: str) -> None:
    operator.create(service(tenant, clusterIP="None"), "--dry-run=server")
    others: list[Object] = [
        {},
        {"type": "NodePort"},
        {"type": "LoadBalancer"},
        {"type": "ExternalName", "externalName": "evil.example"},
        {"clusterIP": "None", "externalIPs": ["192.0.2.1"]},
    ]
    for spec in others:
        with pytest.raises(Refused, match="only headless Services"):
            operator.create(service(tenant, **spec), "--dry-run=server")


def hub_job(stage: str, secret: str) -> Object:
    job = train_job(HUB)
    job["metadata"]["labels"] = {"tributary.dev/stage": stage}
    pod(job)["serviceAccountName"] = "tributary-job"
    pod(job)["volumes"].pop()
    container(job)["volumeMounts"].pop()
    in_container(args=[stage])(job)
    container(job)["env"] = [{"name": TASK_ENV, "value": "{}"}, secret_env("AWS_ACCESS_KEY_ID", secret)]
    return job


STAGE_SECRETS = {
    "aggregate": "tributary-aggregator",
    "evaluate": "tributary-aggregator",
    "compress": "tributary-serving",
    "gate": "tributary-serving",
}


@pytest.mark.parametrize("stage", STAGE_SECRETS)
def test_a_stage_in_the_hub_has_its_own_identity_only(operator: Kubectl, stage: str) -> None:
    """Compression and gate hold no credential with which deltas can be read."""
    own = STAGE_SECRETS[stage]
    operator.create(hub_job(stage, own), "--dry-run=server")
    (other,) = set(STAGE_SECRETS.values()) - {own}
    with pytest.raises(Refused, match="S3 keys of the stage"):
        operator.create(hub_job(stage, other), "--dry-run=server")


HUB_BYPASSES: dict[str, tuple[Change, str]] = {
    "other image": (
        in_container(image=f"localhost/evil{PINNED}"),
        "the image must be the chart's workerImage",
    ),
    "command": (in_container(command=["sh"]), ENTRY_POINT),
    "training": (in_container(args=["train"]), "the arguments must be one stage"),
    "serving in a Job": (in_container(args=["serve"]), "the arguments must be one stage"),
    "account": (in_pod(serviceAccountName="default"), "service account must be tributary-job"),
    "secret volume": (volume({"secret": {"secretName": "tributary-aggregator"}}), "scratch volumes only"),
    "probe": (in_container(livenessProbe=EXEC), "probes and hooks run no commands"),
}


@pytest.mark.parametrize("bypass", HUB_BYPASSES)
def test_a_way_round_in_the_hub_is_refused(operator: Kubectl, bypass: str) -> None:
    change, reason = HUB_BYPASSES[bypass]
    job = hub_job("aggregate", "tributary-aggregator")
    change(job)
    with pytest.raises(Refused) as refused:
        operator.create(job, "--dry-run=server")
    assert reason in str(refused.value)


def test_others_are_not_concerned(installed: Kubectl, tenant: str) -> None:
    """The owner runs what it likes in its own namespace."""
    job = train_job(tenant)
    in_container(image="postgres:16", command=["postgres"], args=[])(job)
    installed.create(job, "--dry-run=server")
