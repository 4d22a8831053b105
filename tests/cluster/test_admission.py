"""What a tampered operator could do with its identity in a data owner's namespace: train, or nothing.

Each way round is tried in the name of the operator's service account, and refused with its reason.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from forged_jobs import (
    CONTEXT,
    ENTRY_POINT,
    EXEC,
    KEY_ITEM,
    MESSAGE,
    MOUNTS,
    NAMED_SECRET,
    NO_HOOKS,
    NODE,
    NOISE_KEY,
    NOT_YOURS,
    ONE_CONTAINER,
    OTHER_PROGRAM,
    POD_CONTEXT,
    REFERENCE,
    SECOND,
    TASK,
    VARIABLES,
    VOLUMES,
    Change,
    container,
    env,
    in_container,
    in_pod,
    insecure,
    labelled,
    mounted,
    noise_key,
    pod,
    projected,
    secret_env,
    tasked,
    train_job,
    training_for,
    volume,
)
from installation import WORKER_IMAGE, client_values, rendered
from kube import PINNED, Kubectl, Object, Refused
from kubernetes.aio.client import ApiClient, Configuration
from round_worlds import EVALUATION, NEW, SETTINGS, a_plan, a_round
from signers import OWNER_KEY

from tributary_api.client import FederatedClient
from tributary_api.tasks import DATA_MOUNT_PATH, NOISE_KEY_PATH, TASK_ENV
from tributary_operator.api import Api
from tributary_operator.rounds import children
from tributary_operator.rounds.situation import Run

pytestmark = pytest.mark.cluster

NOISE_KEY_FOLDER = str(Path(NOISE_KEY_PATH).parent)
CLAIM: Object = {"persistentVolumeClaim": {"claimName": "texts"}}

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
        OTHER_PROGRAM,
    ),
    "secret of ours by environment": (
        lambda job: container(job)["env"].__setitem__(2, secret_env("AWS_ACCESS_KEY_ID", "tributary-other")),
        NAMED_SECRET,
    ),
    "noise key by environment": (
        lambda job: container(job)["env"].__setitem__(
            2, secret_env("AWS_ACCESS_KEY_ID", "tributary-noise-key")
        ),
        NAMED_SECRET,
    ),
    "secret key as the access key's name, which is sent in clear": (
        lambda job: container(job)["env"].__setitem__(
            2, secret_env("AWS_ACCESS_KEY_ID", "tributary-store", "AWS_SECRET_ACCESS_KEY")
        ),
        "the entry of their own name",
    ),
    "secret in another variable": (env(secret_env(f"{TASK_ENV}_2", "tributary-store")), VARIABLES),
    "all of a secret": (in_container(envFrom=[{"secretRef": {"name": "registry-password"}}]), VARIABLES),
    "secret volume": (volume({"secret": {"secretName": "registry-password"}}), OTHER_PROGRAM),
    "secret volume of ours": (volume({"secret": {"secretName": "tributary-other"}}), NOISE_KEY),
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
    "data's claim as the noise key": (
        lambda job: (volume(CLAIM)(job), noise_key(name="more", subPath="known")(job)),
        MOUNTS,
    ),
    "data's whole claim as the noise key": (
        lambda job: (volume(CLAIM)(job), noise_key(name="more")(job)),
        MOUNTS,
    ),
    "data's claim around the noise key": (mounted(CLAIM, "/var/run/tributary"), MOUNTS),
    "data's claim as scratch space": (mounted(CLAIM, "/var/run/tributary/tmp"), MOUNTS),
    "part of the data's claim": (mounted(CLAIM, DATA_MOUNT_PATH, subPath="some"), MOUNTS),
    "scratch space as the data": (mounted({"emptyDir": {}}, DATA_MOUNT_PATH), MOUNTS),
    "scratch space as the noise key": (mounted({"emptyDir": {}}, NOISE_KEY_FOLDER + "/"), MOUNTS),
    "noise key as the data": (noise_key(mountPath=DATA_MOUNT_PATH), MOUNTS),
    "part of the noise key": (noise_key(subPath="key"), MOUNTS),
    "part of the noise key by expression": (noise_key(subPathExpr="$(OMP_NUM_THREADS)"), MOUNTS),
    "mount over code by dots": (noise_key(mountPath="/var/run/tributary/../../../usr/lib/python3"), MOUNTS),
    "noise key under another name": (
        lambda job: pod(job)["volumes"][2]["secret"].update(items=[{"key": "key", "path": "other"}]),
        NOISE_KEY,
    ),
    "termination message over code": (in_container(terminationMessagePath="/usr/lib/x.py"), MESSAGE),
    "log as the termination message": (
        in_container(terminationMessagePolicy="FallbackToLogsOnError"),
        MESSAGE,
    ),
    "secret in the task": (tasked("$(AWS_SECRET_ACCESS_KEY)"), REFERENCE),
    "no task": (lambda job: container(job)["env"].pop(0), TASK),
    "two tasks": (env({"name": TASK_ENV, "value": "{}"}), TASK),
    "python path": (env({"name": "PYTHONPATH", "value": "/tmp"}), VARIABLES),
    "preload": (env({"name": "LD_PRELOAD", "value": "/tmp/x.so"}), VARIABLES),
    "store override": (env({"name": "AWS_ENDPOINT_URL", "value": "http://evil"}), VARIABLES),
    "termination log elsewhere": (
        env({"name": "TRIBUTARY_TERMINATION_MESSAGE_PATH", "value": "/x"}),
        VARIABLES,
    ),
    "literal key": (
        lambda job: container(job)["env"].__setitem__(2, {"name": "AWS_ACCESS_KEY_ID", "value": "mine"}),
        "S3 keys come from the entry of their own name",
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


@pytest.mark.parametrize("data_uri", ["s3://clinic-a/notes/", "pvc://texts/notes/"])
async def test_what_the_operators_builders_make_is_admitted(
    installed: Kubectl, operator: Kubectl, tenant: str, data_uri: str
) -> None:
    data = json.dumps({"spec": {"data": {"uri": data_uri}}})
    installed("patch", "fclient/notes", "-n", tenant, "--type=merge", f"-p={data}")
    client = FederatedClient.model_validate(installed.get("fclient/notes", "-n", tenant))
    fedround = a_round(evaluation=EVALUATION)
    plan = a_plan(fedround, [client]).model_copy(update={"worker_image": WORKER_IMAGE})
    run = Run(fedround, plan, SETTINGS)
    plain = Api(ApiClient(Configuration()), 1).plain
    for manifest in (
        children.train_job(run, plan.cohort[0], client, 0),
        children.rendezvous_service(run, plan.cohort[0], attempt=0, job_uid=None),
        children.aggregate_job(run, {plan.cohort[0].client: OWNER_KEY.public}, 0),
        children.evaluate_job(run, NEW, 0),
    ):
        operator.create(plain(manifest), "--dry-run=server")


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
    training_for("loose")(job)
    in_container(image=f"localhost/loose{PINNED}")(job)
    try:
        with pytest.raises(Refused, match=r"is not in spec\.worker\.allowedImages of (notes|unwilling)"):
            operator.create(job, "--dry-run=server")
    finally:
        installed("delete", "fclient", "loose", "-n", tenant)


ANOTHERS_TASKS = {
    "plain": '{"grant":{"client":CLIENT}}',
    "spaced": '{"grant":{"client": CLIENT},"x":{"client":OWN}}',
    "spaced before the colon": '{"grant":{"client" :CLIENT},"x":{"client":OWN}}',
    "said twice": '{"grant":{"client":CLIENT,"client":OWN}}',
    "beside": '{"x":{"client":OWN},"grant":{"client":CLIENT}}',
    "escaped": r'{"grant":{"\u0063lient":CLIENT},"x":{"client":OWN}}',
    "in a text": r'{"grant":{"client":CLIENT},"x":"\"client\":OWN"}',
    "other namespace": '{"grant":{"client":{"name":"gone","namespace":"elsewhere"}}}',
}


@pytest.fixture(scope="module")
def gone(installed: Kubectl, helm: Path, tenant: str) -> str:
    """A client that was removed, while its role was left behind."""
    chart = rendered(helm, "tributary-client", tenant, client_values("gone", sharedObjects={"create": False}))
    installed.apply(*(o for o in chart if o["kind"] in {"Role", "RoleBinding"}))
    return "gone"


@pytest.mark.parametrize("spelling", ANOTHERS_TASKS)
def test_a_job_labelled_for_a_gone_client_cannot_train_for_another(
    operator: Kubectl, tenant: str, gone: str, spelling: str
) -> None:
    """No client is there whose Secrets and claims the Job's could be compared with."""
    other, own = (f'{{"name":"{name}","namespace":"{tenant}"}}' for name in ("notes", gone))
    job = train_job(tenant)
    training_for(gone)(job)
    mounted(CLAIM, DATA_MOUNT_PATH)(job)
    operator.create(job, "--dry-run=server")  # of no use: the worker finds no FederatedClient and stops
    tasked(ANOTHERS_TASKS[spelling].replace("CLIENT", other).replace("OWN", own))(job)
    assert operator.is_refused(job, TASK)


@pytest.mark.parametrize(
    "secret",
    [
        {"secretName": "tributary-store"},
        {"secretName": "tributary-store", "items": [{"key": "AWS_ACCESS_KEY_ID", "path": "key"}]},
        {"secretName": "tributary-noise-key", "items": [KEY_ITEM], "optional": True},
    ],
)
def test_no_other_entry_becomes_the_noise_key_of_a_gone_client(
    operator: Kubectl, tenant: str, gone: str, secret: Object
) -> None:
    job = train_job(tenant)
    training_for(gone)(job)
    pod(job)["volumes"][2]["secret"] = secret
    assert operator.is_refused(job, NOISE_KEY)


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


def test_others_are_not_concerned(installed: Kubectl, tenant: str) -> None:
    """The owner runs what it likes in its own namespace."""
    job = train_job(tenant)
    in_container(image="postgres:16", command=["postgres"], args=[])(job)
    installed.create(job, "--dry-run=server")
