"""Gathers the summary from what the run has left: status of our objects, records in the store, counters."""

from __future__ import annotations

from collections.abc import Sequence

from docstrings_demo.observe import Load, Seen
from docstrings_demo.owners import BUCKET
from docstrings_demo.problems import DemoError
from docstrings_demo.summary import (
    Budget,
    ClientSummary,
    ReleaseSummary,
    RequestSummary,
    RoundSummary,
    Summary,
)
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import DeltaManifest, GateVerdict, ModelScore
from tributary_api.release import ModelRelease, Revision
from tributary_api.round import FederatedRound
from tributary_api.shared import Metric
from tributary_store.keys import Layout
from tributary_store.objects import Objects

LAYOUT = Layout(BUCKET)
GATES = f"s3://{BUCKET}/gates/"


def summary(store: Objects, seen: Seen, load: Load, seconds: float) -> Summary:
    verdicts = gate_verdicts(store)
    return Summary(
        rounds=[round_summary(store, seen, item) for item in by_name(seen.rounds)],
        releases=[
            release_summary(revision, verdicts)
            for release in seen.releases
            for revision in in_service_order(release)
        ],
        requests=RequestSummary(sent=load.sent, failed=load.failed, per_release=dict(load.per_release)),
        seconds=round(seconds, 1),
    )


def budgets(seen: Seen) -> list[Budget]:
    """What each client's ledger has come to, as the operator reads it."""
    return [
        Budget(
            namespace=client.metadata.namespace,
            spent=float(client.status.privacy.spent_epsilon or "0"),
            budget=float(client.spec.privacy.budget.epsilon),
        )
        for client in seen.clients
    ]


def by_name(rounds: Sequence[FederatedRound]) -> list[FederatedRound]:
    return sorted(rounds, key=lambda item: item.metadata.name)


def round_summary(store: Objects, seen: Seen, fedround: FederatedRound) -> RoundSummary:
    return RoundSummary(
        name=fedround.metadata.name,
        clients=[client_summary(store, seen, fedround, name_of(client)) for client in seen.clients],
        loss_before=metric(fedround.status.metrics, "baselineLoss"),
        loss_after=metric(fedround.status.metrics, "loss"),
    )


def client_summary(
    store: Objects, seen: Seen, fedround: FederatedRound, client: NamespacedName
) -> ClientSummary:
    uri = LAYOUT.delta_manifest(client, fedround.run_key)
    receipt = DeltaManifest.model_validate_json(store.get(uri)).receipt
    pods = seen.training_pods(fedround.run_key, client.namespace)
    return ClientSummary(
        namespace=client.namespace,
        epsilon=float(receipt.epsilon),
        pods=sum(pod.phase == "Succeeded" for pod in pods),
    )


def name_of(client: FederatedClient) -> NamespacedName:
    return NamespacedName(namespace=client.metadata.namespace, name=client.metadata.name)


def in_service_order(release: ModelRelease) -> list[Revision]:
    """The revisions that have served, the first one first."""
    serving = [release.status.stable] if release.status.stable else []
    return [*reversed(release.status.history), *serving]


def gate_verdicts(store: Objects) -> list[GateVerdict]:
    return [GateVerdict.model_validate_json(store.get(item.uri)) for item in store.list(GATES)]


def release_summary(revision: Revision, verdicts: Sequence[GateVerdict]) -> ReleaseSummary:
    for verdict in verdicts:
        candidate, parent = score(verdict, "candidate"), score(verdict, "parent")
        if candidate and parent and candidate.model == revision.model:
            return ReleaseSummary(
                digest=revision.model.digest,
                bytes=revision.bytes,
                parent_bytes=revision.parent_bytes,
                loss=candidate.loss,
                parent_loss=parent.loss,
                gate=verdict.verdict,
            )
    raise DemoError(f"revision {revision.revision} serves, but {GATES} holds no verdict about its model")


def score(verdict: GateVerdict, role: str) -> ModelScore | None:
    return next((found for found in verdict.scores if found.role == role), None)


def metric(metrics: Sequence[Metric], name: str) -> float:
    for found in metrics:
        if found.name == name:
            return float(found.value)
    raise DemoError(f"a round's status has no metric {name}: {', '.join(m.name for m in metrics) or 'none'}")
