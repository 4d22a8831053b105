"""The Jobs of a round. Each builder is a pure function of the round, its plan and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from kubernetes.aio.client import (
    V1ContainerPort,
    V1Job,
    V1JobSpec,
    V1KeyToPath,
    V1ObjectMeta,
    V1OwnerReference,
    V1PersistentVolumeClaimVolumeSource,
    V1SecretVolumeSource,
    V1Service,
    V1ServicePort,
    V1ServiceSpec,
    V1Volume,
    V1VolumeMount,
)

from tributary_api.base import API_VERSION, ApiModel
from tributary_api.client import WORKER_SERVICE_ACCOUNT, FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import PlannedClient
from tributary_api.round import FederatedRound
from tributary_api.shared import ModelRef, StoreEndpoint
from tributary_api.tasks import (
    DATA_CREDENTIALS_PREFIX,
    DATA_MOUNT_PATH,
    NOISE_KEY_PATH,
    RENDEZVOUS_PORT,
    AggregateTask,
    DeltaInput,
    EvaluateTask,
    ScoredModel,
    TrainTask,
)
from tributary_operator import names
from tributary_operator.pods import PodShape, pod_template, s3_identity, threads
from tributary_operator.rounds.situation import Run

PVC_SCHEME = "pvc://"


def train_job(run: Run, planned: PlannedClient, client: FederatedClient, attempt: int) -> V1Job:
    """One gang of workers beside one owner's data."""
    name = names.train_job(run.fedround, planned.client, attempt)
    worker, store = client.spec.worker, client.spec.store
    data_store = client.spec.data.store
    volumes, mounts = _private_volumes(client)
    shape = PodShape(
        stage=names.TRAIN,
        image=run.plan.worker_image,
        task=train_task(run, planned, client, attempt),
        service_account=WORKER_SERVICE_ACCOUNT,
        resources=worker.resources,
        placement=worker,
        threads=threads(worker.resources, worker.processes_per_node),
        env=[
            *s3_identity(store.credentials_secret),
            *(s3_identity(data_store.credentials_secret, DATA_CREDENTIALS_PREFIX) if data_store else ()),
        ],
        volumes=volumes,
        mounts=mounts,
        ports=[V1ContainerPort(name="rendezvous", container_port=RENDEZVOUS_PORT)],
        mounts_token=True,  # the worker reads its own FederatedClient once more before it starts
        # Cluster DNS names a pod only below the Service that its subdomain names.
        pod_fields={"subdomain": name} if planned.nodes > 1 else {},
    )
    labels = {**names.round_labels(run.fedround, names.TRAIN, attempt), names.CLIENT: planned.client.name}
    if worker.queue_name:
        labels[names.KUEUE_QUEUE] = worker.queue_name
    metadata = _metadata(run.fedround, name, planned.client.namespace, labels)
    deadline_seconds = run.fedround.spec.client_active_deadline_seconds
    return _job(run.fedround, metadata, shape, pods=planned.nodes, deadline_seconds=deadline_seconds)


def train_task(run: Run, planned: PlannedClient, client: FederatedClient, attempt: int) -> TrainTask:
    spec, layout = run.fedround.spec, run.settings.layout
    job = names.train_job(run.fedround, planned.client, attempt)
    is_gang = planned.nodes > 1
    return TrainTask(
        grant=planned.grant,
        grant_signature=planned.grant_signature,
        base_model=run.plan.base_model,
        task=spec.task,
        method=spec.method,
        training=spec.training,
        data=client.spec.data,
        ledger_uri=planned.ledger_uri,
        store=StoreEndpoint(endpoint=client.spec.store.endpoint, region=client.spec.store.region),
        delta_uri=planned.grant.delta_uri,
        manifest_uri=layout.delta_manifest(planned.client, run.plan.run_key),
        delta_encoding=spec.aggregation.delta_encoding,
        nodes=planned.nodes,
        processes_per_node=client.spec.worker.processes_per_node,
        rendezvous_host=names.rendezvous_host(job, planned.client.namespace) if is_gang else "",
        image=run.plan.worker_image,
        attempt=attempt,
    )


def rendezvous_service(run: Run, planned: PlannedClient, *, attempt: int, job_uid: str | None) -> V1Service:
    """Headless Service by which a gang finds index 0. With the Job's UID it goes when the Job goes."""
    job = names.train_job(run.fedround, planned.client, attempt)
    owner = V1OwnerReference(api_version="batch/v1", kind="Job", name=job, uid=job_uid) if job_uid else None
    return V1Service(
        api_version="v1",
        kind="Service",
        metadata=V1ObjectMeta(
            name=job,
            namespace=planned.client.namespace,
            labels=names.round_labels(run.fedround, names.TRAIN, attempt),
            owner_references=[owner] if owner else None,
        ),
        spec=V1ServiceSpec(
            cluster_ip="None",
            selector={names.JOB_NAME: job},
            publish_not_ready_addresses=True,  # the pods meet before any of them could be called ready
            ports=[V1ServicePort(name="rendezvous", port=RENDEZVOUS_PORT)],
        ),
    )


def aggregate_job(run: Run, receipt_keys: Mapping[NamespacedName, str], attempt: int) -> V1Job:
    """`receipt_keys`: of the clients that have delivered, the key that signed each manifest."""
    layout = run.settings.layout
    members = {planned.client: planned for planned in run.plan.cohort}
    task = AggregateTask(
        run_key=run.plan.run_key,
        round=run.plan.round,
        base_model=run.plan.base_model,
        task=run.fedround.spec.task,
        method=run.fedround.spec.method,
        aggregation=run.fedround.spec.aggregation,
        deltas=[_delta_input(run, members[c], receipt_keys[c]) for c in sorted(receipt_keys, key=str)],
        quorum=run.plan.quorum,
        store=run.settings.store_for_pods,
        models_uri=layout.models,
        manifest_uri=layout.aggregate_manifest(run.plan.run_key),
    )
    pods = task.aggregation.parallelism
    name = names.aggregate_job(run.fedround, attempt)
    return _hub_job(run, names.AGGREGATE, task, name, attempt=attempt, pods=pods)


def _delta_input(run: Run, planned: PlannedClient, receipt_key: str) -> DeltaInput:
    layout, run_key = run.settings.layout, run.plan.run_key
    return DeltaInput(
        client=planned.client,
        delta_uri=planned.grant.delta_uri,
        manifest_uri=layout.delta_manifest(planned.client, run_key),
        grant_digest=planned.grant.digest,
        receipt_key=receipt_key,
        weight=planned.weight,
    )


def evaluate_job(run: Run, model: ModelRef, attempt: int) -> V1Job:
    """Scores the model that the round started from and the one it made. Needs spec.evaluation."""
    spec = run.fedround.spec
    if spec.evaluation is None:
        raise ValueError(f"round {run.fedround.ref} asks for no evaluation")
    task = EvaluateTask(
        task=spec.task,
        models=[
            ScoredModel(role="baseline", model=run.plan.base_model),
            ScoredModel(role="new", model=model),
        ],
        dataset=spec.evaluation.dataset,
        max_sequence_length=spec.training.max_sequence_length,
        store=run.settings.store_for_pods,
        report_uri=run.settings.layout.evaluation(run.plan.run_key),
    )
    return _hub_job(run, names.EVALUATE, task, names.evaluate_job(run.fedround, attempt), attempt=attempt)


def _hub_job(run: Run, stage: str, task: ApiModel, name: str, *, attempt: int, pods: int = 1) -> V1Job:
    settings, fedround = run.settings, run.fedround
    shape = PodShape(
        stage=stage,
        image=run.plan.worker_image,
        task=task,
        service_account=settings.hub_service_account,
        resources=settings.hub_job_resources,
        threads=threads(settings.hub_job_resources),
        env=s3_identity(settings.aggregator_secret),
    )
    labels = names.round_labels(fedround, stage, attempt)
    metadata = _metadata(fedround, name, fedround.metadata.namespace, labels)
    # Owner references do not cross namespaces; here, in the round's own, they clean up without the operator.
    metadata.owner_references = [_owner(fedround)]
    return _job(fedround, metadata, shape, pods=pods, deadline_seconds=settings.hub_job_deadline_seconds)


def _owner(fedround: FederatedRound) -> V1OwnerReference:
    return V1OwnerReference(
        api_version=API_VERSION,
        kind=fedround.KIND,
        name=fedround.metadata.name,
        uid=fedround.metadata.uid,
        controller=True,
    )


def _metadata(fedround: FederatedRound, name: str, namespace: str, labels: dict[str, str]) -> V1ObjectMeta:
    annotations = names.round_annotations(fedround)
    return V1ObjectMeta(name=name, namespace=namespace, labels=labels, annotations=annotations)


def _job(
    fedround: FederatedRound, metadata: V1ObjectMeta, shape: PodShape, *, pods: int, deadline_seconds: int
) -> V1Job:
    spec = fedround.spec
    return V1Job(
        api_version="batch/v1",
        kind="Job",
        metadata=metadata,
        spec=V1JobSpec(
            completion_mode="Indexed",
            completions=pods,
            parallelism=pods,
            backoff_limit=0,  # the whole gang is tried again, as the next attempt
            pod_replacement_policy="Failed",  # two pods of one index must never run at once
            active_deadline_seconds=deadline_seconds,
            # A failed attempt must stay visible until the round is over: attempts are counted by what exists.
            ttl_seconds_after_finished=spec.active_deadline_seconds + spec.ttl_seconds_after_finished,
            template=pod_template(shape, metadata.labels or {}, metadata.annotations or {}),
        ),
    )


def _private_volumes(client: FederatedClient) -> tuple[list[V1Volume], list[V1VolumeMount]]:
    key = PurePosixPath(NOISE_KEY_PATH)
    secret = V1SecretVolumeSource(
        secret_name=client.spec.privacy.noise_key_secret,
        items=[V1KeyToPath(key="key", path=key.name)],
        default_mode=0o440,
    )
    volumes = [V1Volume(name="noise-key", secret=secret)]
    mounts = [V1VolumeMount(name="noise-key", mount_path=str(key.parent), read_only=True)]
    uri = client.spec.data.uri
    if uri.startswith(PVC_SCHEME):
        claim = uri.removeprefix(PVC_SCHEME).split("/", 1)[0]
        source = V1PersistentVolumeClaimVolumeSource(claim_name=claim, read_only=True)
        volumes.append(V1Volume(name="data", persistent_volume_claim=source))
        mounts.append(V1VolumeMount(name="data", mount_path=DATA_MOUNT_PATH, read_only=True))
    return volumes, mounts
