"""Every name, label and annotation the operator gives to anything. Nothing else spells one."""

from __future__ import annotations

import hashlib

from tributary_api.base import GROUP
from tributary_api.meta import NamespacedName
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound

FIELD_MANAGER = "tributary"
FINALIZER = f"{GROUP}/children"
REPORTER = f"{GROUP}/operator"
"""Who emits events."""
LEASE = "tributary-operator"
"""In the operator's own namespace: its holder leads."""

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY_VALUE = "tributary"
STAGE = f"{GROUP}/stage"
RUN_KEY = f"{GROUP}/run-key"
CLIENT = f"{GROUP}/client"
"""On a training Job: the FederatedClient, of the same namespace, that it runs for. Admission checks it."""
ATTEMPT = f"{GROUP}/attempt"
RELEASE = f"{GROUP}/release"
REVISION = f"{GROUP}/revision"
RECORD = f"{GROUP}/record"
"""On a Job of a release: the key of the record that it makes."""
REVISION_RECORD = f"{GROUP}/revision-record"
"""Annotation on a serving Deployment: its Revision as JSON, so that what serves can always be told."""
OWNER = f"{GROUP}/owner"
"""Annotation `<kind>/<namespace>/<name>` of the object whose daemon an event of this child wakes."""
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
JOB_NAME = "batch.kubernetes.io/job-name"
NAMESPACE_NAME = "kubernetes.io/metadata.name"
"""Label that the API server itself puts on each namespace."""

TRAIN, AGGREGATE, EVALUATE, COMPRESS, GATE, SERVE = (
    "train",
    "aggregate",
    "evaluate",
    "compress",
    "gate",
    "serve",
)
"""Stages of the worker image: its arguments, the container's name and the value of STAGE."""

NAME_LENGTH_MAX = 63
"""Of a DNS label: Job names become host names, label values and parts of Service names."""
INDEX_LENGTH = 3
"""An Indexed Job's pods are named <job>-<index>; 64 nodes are the most."""
HASH_LENGTH = 8


def bounded(*parts: str, length: int = NAME_LENGTH_MAX) -> str:
    """The parts joined by dashes; if that is too long, cut and told apart by a hash of the whole."""
    whole = "-".join(parts)
    if len(whole) <= length:
        return whole
    short = hashlib.sha256(whole.encode()).hexdigest()[:HASH_LENGTH]
    return f"{whole[: length - HASH_LENGTH - 1].rstrip('-.')}-{short}"


def owner(kind: str, namespace: str, name: str) -> str:
    return f"{kind}/{namespace}/{name}"


def _of_round(fedround: FederatedRound, *parts: str) -> str:
    # The run key tells apart rounds of equal names: of two hubs, or applied again with another spec.
    room = NAME_LENGTH_MAX - INDEX_LENGTH - sum(len(part) + 1 for part in parts) - HASH_LENGTH - 1
    # An object's name may hold dots, a host name's label must not.
    name = bounded(fedround.metadata.name.replace(".", "-"), length=room)
    return "-".join([name, fedround.run_key[:HASH_LENGTH], *parts])


def train_job(fedround: FederatedRound, client: NamespacedName, attempt: int) -> str:
    short = bounded(client.name, length=24)
    return _of_round(fedround, short, str(attempt))


def aggregate_job(fedround: FederatedRound, attempt: int) -> str:
    return _of_round(fedround, AGGREGATE, str(attempt))


def evaluate_job(fedround: FederatedRound, attempt: int) -> str:
    return _of_round(fedround, EVALUATE, str(attempt))


def rendezvous_host(job: str, namespace: str) -> str:
    """DNS name of the pod with index 0 of an Indexed Job whose headless Service has the Job's name."""
    return f"{job}-0.{job}.{namespace}.svc"


def round_labels(fedround: FederatedRound, stage: str, attempt: int) -> dict[str, str]:
    return {
        MANAGED_BY: MANAGED_BY_VALUE,
        STAGE: stage,
        RUN_KEY: fedround.run_key,
        ATTEMPT: str(attempt),
    }


def round_annotations(fedround: FederatedRound) -> dict[str, str]:
    return {OWNER: owner(FederatedRound.KIND, fedround.metadata.namespace, fedround.metadata.name)}


def release_job(release: ModelRelease, stage: str, key: str, attempt: int) -> str:
    """A Job of a release that makes the record with this key."""
    tail = f"{stage}-{key[:HASH_LENGTH]}-{attempt}"
    room = NAME_LENGTH_MAX - INDEX_LENGTH - len(tail) - 1
    return f"{bounded(release.metadata.name, length=room)}-{tail}"


def serving_deployment(release: ModelRelease, revision: str) -> str:
    room = NAME_LENGTH_MAX - len(revision) - 1
    return f"{bounded(release.metadata.name, length=room)}-{revision}"


def disruption_budget(release: ModelRelease) -> str:
    return bounded(release.metadata.name)


def release_labels(release: ModelRelease, stage: str) -> dict[str, str]:
    return {MANAGED_BY: MANAGED_BY_VALUE, STAGE: stage, RELEASE: bounded(release.metadata.name)}


def serving_labels(release: ModelRelease, revision: str) -> dict[str, str]:
    return {**release_labels(release, SERVE), REVISION: revision}


def release_annotations(release: ModelRelease) -> dict[str, str]:
    return {OWNER: owner(ModelRelease.KIND, release.metadata.namespace, release.metadata.name)}
