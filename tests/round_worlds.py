"""Rounds, clients and what is seen of them, for tests of decisions; a world where all workers deliver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from signers import HUB_ENVIRONMENT, HUB_KEY, OWNER_KEY

from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import (
    AggregateManifest,
    DeltaManifest,
    EvaluationReport,
    FileDigest,
    LedgerKind,
    ModelScore,
    Receipt,
    RoundOutcome,
    RoundPlan,
    SelfTestFigures,
)
from tributary_api.round import FederatedRound, FederatedRoundStatus
from tributary_api.shared import ModelRef, TaskKind
from tributary_operator import names
from tributary_operator.decision import Decision, Delete, LedgerRecord, PutRecord
from tributary_operator.jobs import JobState, ObservedJob
from tributary_operator.rounds.decide import decide
from tributary_operator.rounds.eligibility import name_of
from tributary_operator.rounds.observed import (
    NO_ATTEMPTS,
    Attempts,
    BaseModel,
    Candidate,
    ObservedRound,
    Selection,
    WorkerFailure,
)
from tributary_operator.rounds.planning import grant, plan
from tributary_operator.rounds.situation import Situation
from tributary_operator.settings import Settings

T0 = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64
IMAGE = "localhost/tributary-worker@" + DIGEST
BASE = ModelRef(uri="s3://tributary/models/base", digest=DIGEST)
NEW = ModelRef(uri="s3://tributary/models/new", digest="sha256:" + "b" * 64)
SETTINGS = Settings.from_environment(
    {"TRIBUTARY_WORKER_IMAGE": IMAGE, "TRIBUTARY_BUCKET": "tributary", **HUB_ENVIRONMENT}
)
EVALUATION = {"dataset": {"uri": "s3://tributary/datasets/public.jsonl", "digest": DIGEST}}


def a_round(*, status: Any = None, **spec: Any) -> FederatedRound:
    """A valid FederatedRound; a test spells out only what it is about."""
    return FederatedRound.model_validate(
        {
            "metadata": {
                "name": "r1",
                "namespace": "hub",
                "uid": "u1",
                "generation": 1,
                "resourceVersion": "1",
            },
            "spec": {
                "baseModel": {"uri": BASE.uri, "digest": BASE.digest},
                "clients": {},
                "method": {"lora": {}},
                "training": {"maxSteps": 10, "expectedBatchSize": 64, "learningRate": "1e-3"},
                "privacy": {"epsilon": "1", "delta": "1e-6"},
                **spec,
            },
            "status": status or {},
        }
    )


def a_client(name: str = "a", *, age: int = 0, data: Any = None, **spec: Any) -> FederatedClient:
    """A client in a namespace of its own name."""
    base = {
        "data": {"name": "notes", "uri": f"s3://{name}-data/notes/", "numExamples": 1000, **(data or {})},
        "store": {"credentialsSecret": "tributary-store"},
        "consent": {"hubs": [{"namespace": "hub"}], "expires": (T0 + timedelta(days=30)).isoformat()},
        "privacy": {
            "budget": {"epsilon": "8", "delta": "1e-6"},
            "maxRoundEpsilon": "2",
            "ledgerUri": f"s3://tributary/ledger/{name}/",
        },
        "worker": {"allowedImages": [IMAGE]},
    }
    created = T0 + timedelta(seconds=age)
    metadata = {
        "name": name,
        "namespace": name,
        "uid": f"uid-{name}",
        "creationTimestamp": created.isoformat(),
    }
    return FederatedClient.model_validate({"metadata": metadata, "spec": {**base, **spec}})


def nn(name: str) -> NamespacedName:
    return NamespacedName(namespace=name, name=name)


def a_plan(fedround: FederatedRound, clients: Iterable[FederatedClient], *, sigma: float = 0.8) -> RoundPlan:
    cohort = [(client, grant(fedround, client, BASE, sigma, SETTINGS.layout)) for client in clients]
    return plan(fedround, cohort, [], base_model=BASE, worker_image=IMAGE, signing_key=HUB_KEY, now=T0)


def a_delta(plan_: RoundPlan, name: str) -> DeltaManifest:
    planned = next(p for p in plan_.cohort if p.client.name == name)
    figures = SelfTestFigures(planted_record_ratio=1.0, noise_std_ratio=1.0, trainable_parameters=8)
    receipt = Receipt(
        grant_digest=planned.grant.digest,
        mechanism=planned.grant.mechanism,
        epsilon="1",
        delta="1e-6",
        self_test=figures,
    )
    file = FileDigest(path="delta.safetensors", size=1, chunks=[DIGEST])
    return OWNER_KEY.signed(
        DeltaManifest(
            run_key=plan_.run_key,
            client=planned.client,
            base_model_digest=planned.grant.base_model_digest,
            file=file,
            l2_norm=1.0,
            receipt=receipt,
        )
    )


def a_job(namespace: str, stage: str, state: JobState, *, attempt: int = 0) -> ObservedJob:
    labels = {names.CLIENT: namespace} if stage == names.TRAIN else {}
    name = f"{namespace}-{stage}-{attempt}"
    return ObservedJob(namespace, name, f"uid-{name}", stage, attempt, state, labels)


CRASH = WorkerFailure("WorkerCrashed", "exit code 1", True)
EMPTY = WorkerFailure("DataEmpty", "no record", False)


def attempts(
    client: str, *states: JobState, failure: WorkerFailure | None = None, stage: str = names.TRAIN
) -> Attempts:
    jobs = tuple(a_job(client, stage, state, attempt=i) for i, state in enumerate(states))
    return Attempts(jobs, failure)


def a_selection(*clients: FederatedClient, **changes: Any) -> Selection:
    """Everything is known and nobody objects."""
    facts: dict[str, Any] = {
        "base_model": BaseModel(BASE),
        "candidates": tuple(Candidate(client) for client in clients),
        "sigmas": {1000: 0.8},
        "budget_problems": {},
        **changes,
    }
    return Selection(**facts)


def an_aggregate(plan_: RoundPlan, included: list[NamespacedName]) -> AggregateManifest:
    return AggregateManifest(
        run_key=plan_.run_key,
        base_model=BASE,
        model=NEW,
        included=included,
        delta_bytes=1,
        bytes_read=1,
        bytes_written=1,
    )


def a_report() -> EvaluationReport:
    scores = [
        ModelScore(role=role, model=model, loss=loss, perplexity=9.0, accuracy=0.5, documents=2, tokens=9)
        for role, model, loss in (("baseline", BASE, 2.5), ("new", NEW, 2.25))
    ]
    return EvaluationReport(task=TaskKind.CAUSAL_LM, dataset_digest=DIGEST, scores=scores)


def decided(
    fedround: FederatedRound, seen: ObservedRound, now: datetime = T0
) -> Decision[FederatedRoundStatus]:
    return decide(Situation(fedround, seen, SETTINGS, now))


def started(decision: Decision[FederatedRoundStatus]) -> list[str]:
    """Names of the Jobs that the decision creates."""
    return [child.metadata.name for child in decision.apply if getattr(child, "kind", "") == "Job"]


def after(seen: ObservedRound, decision: Decision[FederatedRoundStatus]) -> ObservedRound:
    """The next picture in a world where everything that was asked for happens, and every worker delivers."""
    is_announced = seen.plan is not None  # the status of that pass says it
    for record in decision.record:
        seen = _recorded(seen, record)
    for deletion in decision.delete:
        seen = _deleted(seen, deletion)
    for child in decision.apply:
        if child.kind == "Job":
            seen = _ran(seen, child)
    return replace(seen, training=_without_stopped(seen), is_announced=is_announced)


def _recorded(seen: ObservedRound, record: PutRecord | LedgerRecord) -> ObservedRound:
    if isinstance(record, LedgerRecord):
        client = record.planned.client
        if record.kind is LedgerKind.RESERVE:
            return replace(seen, reserved=seen.reserved | {client})
        return replace(seen, closed=seen.closed | {client})
    if isinstance(record.body, RoundPlan):
        clients = {name_of(c.client): c.client for c in seen.selection.candidates} if seen.selection else {}
        return replace(seen, plan=record.body, selection=None, clients=clients)
    assert isinstance(record.body, RoundOutcome)
    return replace(seen, outcome=record.body)


def _deleted(seen: ObservedRound, deletion: Delete) -> ObservedRound:
    training = {
        client: replace(found, jobs=tuple(job for job in found.jobs if job.uid != deletion.uid))
        for client, found in seen.training.items()
    }
    return replace(seen, training=training)


def _ran(seen: ObservedRound, job: Any) -> ObservedRound:
    """The Job has run and written its record."""
    assert seen.plan is not None
    stage = job.metadata.labels[names.STAGE]
    if stage == names.AGGREGATE:
        return replace(seen, aggregate=an_aggregate(seen.plan, sorted(seen.deltas, key=str)))
    if stage == names.EVALUATE:
        return replace(seen, report=a_report())
    client = NamespacedName(namespace=job.metadata.namespace, name=job.metadata.labels[names.CLIENT])
    assert client in seen.reserved, "a worker started before its privacy budget was set aside"
    return replace(seen, deltas={**seen.deltas, client: a_delta(seen.plan, client.name)})


def _without_stopped(seen: ObservedRound) -> dict[NamespacedName, Attempts]:
    """What was active ends one way or the other; here it delivers nothing and its Job is gone."""
    return {client: found if found.active is None else NO_ATTEMPTS for client, found in seen.training.items()}
