"""The children of a release. Each builder is a pure function of the release, a revision and the settings.

All of them lie in the release's namespace and are owned by it, so they go with it even without the operator.
"""

from __future__ import annotations

from kubernetes.aio.client import (
    V1ContainerPort,
    V1Deployment,
    V1DeploymentSpec,
    V1DeploymentStrategy,
    V1HTTPGetAction,
    V1Job,
    V1JobSpec,
    V1LabelSelector,
    V1Lifecycle,
    V1LifecycleHandler,
    V1ObjectMeta,
    V1OwnerReference,
    V1PodDisruptionBudget,
    V1PodDisruptionBudgetSpec,
    V1PodTemplateSpec,
    V1Probe,
    V1RollingUpdateDeployment,
    V1Service,
    V1ServicePort,
    V1ServiceSpec,
    V1SleepAction,
)

from tributary_api.base import API_VERSION
from tributary_api.release import ModelRelease, Revision
from tributary_api.shared import ModelRef
from tributary_api.tasks import SERVE_PORT, CompressTask, GateTask, ServeTask
from tributary_operator import names
from tributary_operator.decision import JsonPatch
from tributary_operator.kinds import DEPLOYMENT, SERVICE
from tributary_operator.pods import PodShape, pod_template, s3_identity, threads
from tributary_operator.releases.identity import Rivals
from tributary_operator.settings import Settings

PORT_NAME = "http"
JOB_TTL_SECONDS = 3600
"""Long enough to read a failed Job's log; its record, not the Job, says that it is done."""
ENDPOINT_REMOVAL_SECONDS = 5
"""A pod goes on answering for this long after its removal began, while proxies still send to it."""
EXIT_SECONDS = 5
"""For the process to end after the last open request."""
START_SECONDS_MAX = 1800
"""A pod may take this long to load its model before it is restarted."""
PROBE_SECONDS = 2


def compress_job(
    release: ModelRelease, parent: ModelRef, key: str, *, attempt: int, settings: Settings
) -> V1Job:
    task = CompressTask(
        task=release.spec.task,
        model=parent,
        steps=release.spec.compression,
        store=settings.store_for_pods,
        releases_uri=settings.layout.releases,
        manifest_uri=settings.layout.compression_manifest(key),
    )
    return _job(release, names.COMPRESS, task, key, attempt=attempt, settings=settings)


def gate_job(
    release: ModelRelease,
    candidate: Revision,
    rivals: Rivals,
    key: str,
    *,
    attempt: int,
    settings: Settings,
) -> V1Job:
    task = GateTask(
        task=release.spec.task,
        candidate=candidate.model,
        parent=candidate.parent,
        stable=rivals.stable,
        stable_parent=rivals.stable_parent,
        best=rivals.best,
        gate=release.spec.gate,
        max_sequence_length=release.spec.serving.max_sequence_length,
        store=settings.store_for_pods,
        verdict_uri=settings.layout.gate_verdict(key),
    )
    return _job(release, names.GATE, task, key, attempt=attempt, settings=settings)


def _job(
    release: ModelRelease,
    stage: str,
    task: CompressTask | GateTask,
    key: str,
    *,
    attempt: int,
    settings: Settings,
) -> V1Job:
    labels = {**names.release_labels(release, stage), names.RECORD: key, names.ATTEMPT: str(attempt)}
    shape = PodShape(
        stage=stage,
        image=settings.worker_image,
        task=task,
        service_account=settings.hub_service_account,
        resources=settings.hub_job_resources,
        placement=release.spec.serving,
        threads=threads(settings.hub_job_resources),
        env=s3_identity(settings.serving_secret),
    )
    return V1Job(
        api_version="batch/v1",
        kind="Job",
        metadata=_metadata(release, names.release_job(release, stage, key, attempt), labels),
        spec=V1JobSpec(
            completions=1,
            parallelism=1,
            backoff_limit=0,  # a failed Job is tried again as the next attempt
            active_deadline_seconds=settings.hub_job_deadline_seconds,
            ttl_seconds_after_finished=JOB_TTL_SECONDS,
            template=pod_template(shape, labels, names.release_annotations(release)),
        ),
    )


def serving_deployment(release: ModelRelease, revision: Revision, settings: Settings) -> V1Deployment:
    """The pods of one revision. Created once; afterwards only the number of its pods changes."""
    labels = names.serving_labels(release, revision.revision)
    metadata = _metadata(release, names.serving_deployment(release, revision.revision), labels)
    record = {names.REVISION_RECORD: revision.canonical_json().decode()}
    metadata.annotations = {**names.release_annotations(release), **record}
    return V1Deployment(
        api_version=DEPLOYMENT.api_version,
        kind=DEPLOYMENT.kind,
        metadata=metadata,
        spec=V1DeploymentSpec(
            replicas=release.spec.serving.replicas,
            selector=V1LabelSelector(match_labels=labels),
            progress_deadline_seconds=release.spec.strategy.blue_green.progress_deadline_seconds,
            # A lost node or a changed template never takes a pod away before its successor is ready.
            strategy=V1DeploymentStrategy(
                type="RollingUpdate",
                rolling_update=V1RollingUpdateDeployment(max_unavailable=0, max_surge=1),
            ),
            template=_serving_pod(release, revision, labels, settings),
        ),
    )


def _serving_pod(
    release: ModelRelease, revision: Revision, labels: dict[str, str], settings: Settings
) -> V1PodTemplateSpec:
    serving = release.spec.serving
    drain_seconds = serving.drain.timeout_seconds
    shape = PodShape(
        stage=names.SERVE,
        image=settings.worker_image,
        task=ServeTask(
            task=release.spec.task,
            model=revision.model,
            release=release.metadata.name,
            revision=revision.revision,
            max_sequence_length=serving.max_sequence_length,
            drain_timeout_seconds=drain_seconds,
            store=settings.store_for_pods,
        ),
        service_account=settings.hub_service_account,
        resources=serving.resources,
        placement=serving,
        threads=threads(serving.resources),
        env=s3_identity(settings.serving_secret),
        ports=[V1ContainerPort(name=PORT_NAME, container_port=SERVE_PORT)],
        restart_policy=None,
        container_fields=_life(),
        pod_fields={
            "termination_grace_period_seconds": ENDPOINT_REMOVAL_SECONDS + drain_seconds + EXIT_SECONDS
        },
    )
    return pod_template(shape, labels, names.release_annotations(release))


def _life() -> dict[str, object]:
    """Probes of the server, and the pause before it is asked to go."""
    return {
        "startup_probe": _probe("/healthz", failures_max=START_SECONDS_MAX // PROBE_SECONDS),
        "readiness_probe": _probe("/readyz", failures_max=3),
        "liveness_probe": _probe("/healthz", failures_max=15),
        "lifecycle": V1Lifecycle(
            pre_stop=V1LifecycleHandler(sleep=V1SleepAction(seconds=ENDPOINT_REMOVAL_SECONDS))
        ),
    }


def _probe(path: str, failures_max: int) -> V1Probe:
    return V1Probe(
        http_get=V1HTTPGetAction(path=path, port=PORT_NAME),
        period_seconds=PROBE_SECONDS,
        # Two cores may be busy with a generation; a slow answer is not a dead server.
        timeout_seconds=5,
        failure_threshold=failures_max,
    )


def service(release: ModelRelease, revision: str) -> V1Service:
    """The Service as it is created. Later its selector is switched by `switch`, never applied."""
    serving = release.spec.serving
    return V1Service(
        api_version=SERVICE.api_version,
        kind=SERVICE.kind,
        metadata=_metadata(release, serving.service_name, names.release_labels(release, names.SERVE)),
        spec=V1ServiceSpec(
            selector=names.serving_labels(release, revision),
            ports=[V1ServicePort(name=PORT_NAME, port=serving.port, target_port=PORT_NAME)],
        ),
    )


def disruption_budget(release: ModelRelease) -> V1PodDisruptionBudget:
    """Drained nodes take one serving pod at a time."""
    labels = names.release_labels(release, names.SERVE)
    return V1PodDisruptionBudget(
        api_version="policy/v1",
        kind="PodDisruptionBudget",
        metadata=_metadata(release, names.disruption_budget(release), labels),
        spec=V1PodDisruptionBudgetSpec(max_unavailable=1, selector=V1LabelSelector(match_labels=labels)),
    )


SELECTED = "/spec/selector/" + names.REVISION.replace("~", "~0").replace("/", "~1")


def switch(release: ModelRelease, old: str, new: str) -> JsonPatch:
    """One atomic write; it fails if the Service does not select `old` any more."""
    return _patch_service(release, old, {"op": "replace", "path": SELECTED, "value": new})


def change_port(release: ModelRelease, selected: str) -> JsonPatch:
    port = release.spec.serving.port
    return _patch_service(release, selected, {"op": "replace", "path": "/spec/ports/0/port", "value": port})


def _patch_service(release: ModelRelease, selected: str, change: dict[str, object]) -> JsonPatch:
    test = {"op": "test", "path": SELECTED, "value": selected}
    return JsonPatch(SERVICE, release.metadata.namespace, release.spec.serving.service_name, (test, change))


def scale(release: ModelRelease, deployment: str, old: int) -> JsonPatch:
    """The number of pods and nothing else: a stable revision keeps the template that it was gated with."""
    path, replicas = "/spec/replicas", release.spec.serving.replicas
    operations = (
        {"op": "test", "path": path, "value": old},
        {"op": "replace", "path": path, "value": replicas},
    )
    return JsonPatch(DEPLOYMENT, release.metadata.namespace, deployment, operations)


def _metadata(release: ModelRelease, name: str, labels: dict[str, str]) -> V1ObjectMeta:
    owner = V1OwnerReference(
        api_version=API_VERSION,
        kind=release.KIND,
        name=release.metadata.name,
        uid=release.metadata.uid,
        controller=True,
    )
    return V1ObjectMeta(
        name=name,
        namespace=release.metadata.namespace,
        labels=labels,
        annotations=names.release_annotations(release),
        owner_references=[owner],
    )
