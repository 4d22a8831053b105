"""The pod that all stages share: restricted security, scratch space, the task, the S3 identity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kubernetes.aio.client import (
    V1Capabilities,
    V1Container,
    V1ContainerPort,
    V1EmptyDirVolumeSource,
    V1EnvVar,
    V1EnvVarSource,
    V1ObjectMeta,
    V1PodSecurityContext,
    V1PodSpec,
    V1PodTemplateSpec,
    V1ResourceRequirements,
    V1SeccompProfile,
    V1SecretKeySelector,
    V1SecurityContext,
    V1Toleration,
    V1Volume,
    V1VolumeMount,
)
from kubernetes.utils.quantity import parse_quantity

from tributary_api.base import ApiModel
from tributary_api.shared import Placement, Resources
from tributary_api.tasks import TASK_ENV

USER_ID = 65532
"""The image's user; nobody on any node."""
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
TERMINATION_GRACE_SECONDS = 30
THREADS_ENV = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class PodShape:
    """What differs between the pods of the stages."""

    stage: str
    image: str
    task: ApiModel
    service_account: str
    resources: Resources
    placement: Placement = field(default_factory=Placement)
    threads: int = 1
    """Of each process, for its numerical libraries."""
    env: Sequence[V1EnvVar] = ()
    volumes: Sequence[V1Volume] = ()
    mounts: Sequence[V1VolumeMount] = ()
    ports: Sequence[V1ContainerPort] = ()
    mounts_token: bool = False
    restart_policy: str | None = "Never"
    """A restarted container would be an attempt that nobody counts. None for a Deployment's pods."""
    container_fields: Mapping[str, object] = field(default_factory=dict[str, object])
    """Further fields of the container: probes and lifecycle of a server."""
    pod_fields: Mapping[str, object] = field(default_factory=dict[str, object])


def pod_template(
    shape: PodShape, labels: Mapping[str, str], annotations: Mapping[str, str]
) -> V1PodTemplateSpec:
    scratch = {"tmp": ("/tmp", None), "shm": ("/dev/shm", "Memory")}
    volumes = [V1Volume(name=n, empty_dir=V1EmptyDirVolumeSource(medium=m)) for n, (_, m) in scratch.items()]
    mounts = [V1VolumeMount(name=n, mount_path=path) for n, (path, _) in scratch.items()]
    container = V1Container(
        name=shape.stage,
        image=shape.image,
        args=[shape.stage],
        env=[
            V1EnvVar(name=TASK_ENV, value=shape.task.canonical_json().decode()),
            V1EnvVar(name=THREADS_ENV, value=str(shape.threads)),
            *shape.env,
        ],
        ports=list(shape.ports) or None,
        resources=resource_requirements(shape.resources),
        security_context=_container_security(),
        volume_mounts=[*mounts, *shape.mounts],
        **shape.container_fields,
    )
    spec = V1PodSpec(
        containers=[container],
        service_account_name=shape.service_account,
        automount_service_account_token=shape.mounts_token,
        enable_service_links=False,
        restart_policy=shape.restart_policy,
        security_context=_pod_security(),
        node_selector=dict(shape.placement.node_selector) or None,
        tolerations=_tolerations(shape.placement) or None,
        volumes=[*volumes, *shape.volumes],
        **{"termination_grace_period_seconds": TERMINATION_GRACE_SECONDS, **shape.pod_fields},
    )
    return V1PodTemplateSpec(
        metadata=V1ObjectMeta(labels=dict(labels), annotations=dict(annotations)), spec=spec
    )


def s3_identity(secret: str | None, prefix: str = "") -> list[V1EnvVar]:
    """Keys of an S3 identity from a Secret of the pod's namespace; nothing for workload identity."""
    if secret is None:
        return []
    return [
        V1EnvVar(
            name=prefix + key,
            value_from=V1EnvVarSource(secret_key_ref=V1SecretKeySelector(name=secret, key=key)),
        )
        for key in S3_KEYS
    ]


def threads(resources: Resources, processes: int = 1) -> int:
    """Threads of one process: its part of the pod's CPUs, by limit or else request; 1 if neither is set."""
    cpu = resources.limits.get("cpu", resources.requests.get("cpu", 1))
    cpus = float(parse_quantity(str(cpu)))  # type: ignore[no-untyped-call]
    return max(1, math.floor(cpus / processes))


def resource_requirements(resources: Resources) -> V1ResourceRequirements:
    return V1ResourceRequirements(
        requests={k: str(v) for k, v in resources.requests.items()} or None,
        limits={k: str(v) for k, v in resources.limits.items()} or None,
    )


def _tolerations(placement: Placement) -> list[V1Toleration]:
    return [V1Toleration(**t.model_dump(exclude_none=True)) for t in placement.tolerations]


def _pod_security() -> V1PodSecurityContext:
    return V1PodSecurityContext(
        run_as_non_root=True,
        run_as_user=USER_ID,
        run_as_group=USER_ID,
        fs_group=USER_ID,
        seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
    )


def _container_security() -> V1SecurityContext:
    return V1SecurityContext(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=V1Capabilities(drop=["ALL"]),
    )
