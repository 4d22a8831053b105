"""Looks at a round's world and sorts it into buckets. The steady state costs no request per client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from tributary_accounting import receipts
from tributary_accounting.ledger import LedgerBroken
from tributary_accounting.signatures import SignatureRefused
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import (
    AggregateManifest,
    DeltaManifest,
    EvaluationReport,
    PlannedClient,
    ProgressMark,
    RoundOutcome,
    RoundPlan,
)
from tributary_api.round import ClientFailure, FederatedRound
from tributary_operator import metrics, names
from tributary_operator.accounting import LedgerRef
from tributary_operator.clients.reading import parsed
from tributary_operator.conditions import is_true
from tributary_operator.jobs import Denied, ObservedJob
from tributary_operator.kinds import CLIENT
from tributary_operator.reconciler import World
from tributary_operator.rounds.affording import affordable_rounds
from tributary_operator.rounds.eligibility import failure
from tributary_operator.rounds.models import trained_weights
from tributary_operator.rounds.observed import Attempts, ObservedRound, WorkerFailure
from tributary_operator.rounds.planning import data_set
from tributary_operator.rounds.selection import select
from tributary_operator.rounds.status import LEDGERS_CLOSED
from tributary_operator.rounds.workers import failure_of
from tributary_operator.store import RecordUnreadable
from tributary_store.errors import AccessDenied

Clients = Mapping[NamespacedName, FederatedClient]
M = TypeVar("M", AggregateManifest, DeltaManifest, EvaluationReport)


@dataclass(slots=True)
class Memory:
    """What need not be asked again. All of it can be lost: it is then read or refused once more."""

    reserved: set[NamespacedName] = field(default_factory=set[NamespacedName])
    closed: set[NamespacedName] = field(default_factory=set[NamespacedName])
    refused: dict[NamespacedName, ClientFailure] = field(default_factory=dict[NamespacedName, ClientFailure])
    failures: dict[str, WorkerFailure] = field(default_factory=dict[str, WorkerFailure])
    """Of Jobs, by UID."""
    forbidden: dict[str, datetime] = field(default_factory=dict[str, datetime])
    """When the API server forbade a Job first, by the Job's name."""
    looked: set[str] = field(default_factory=set[str])
    """Records that were looked for, together with the Job that had ended last."""
    deltas: dict[NamespacedName, DeltaManifest] = field(default_factory=dict[NamespacedName, DeltaManifest])
    announced: bool = False
    """The status says that the ledgers are being asked."""
    is_counted: bool = False
    """The bytes of the aggregation are in the metrics."""
    trained_weights: int | None = None
    affordable_rounds: int | None = None


async def observe(world: World, fedround: FederatedRound, owner: str, memory: Memory) -> ObservedRound:
    layout, run_key = world.settings.layout, fedround.run_key
    outcome = await world.records.find(layout.outcome(run_key), RoundOutcome)
    plan = await world.records.find(layout.plan(run_key), RoundPlan)
    if outcome is not None:
        if plan is None:
            return ObservedRound(outcome=outcome)
        return await _finished(world, fedround, plan, outcome, owner=owner, memory=memory)
    if plan is not None:
        return await _planned(world, fedround, plan, owner, memory)
    selection = await select(world, fedround, owner, ask_ledgers=memory.announced)
    memory.announced = True
    return ObservedRound(selection=selection)


async def _planned(
    world: World, fedround: FederatedRound, plan: RoundPlan, owner: str, memory: Memory
) -> ObservedRound:
    # Jobs before records: a Job that ended in this picture has written its record before we look for it.
    jobs, denied = await _jobs(world, fedround, plan, None, owner)
    clients, invalid = await _clients(world, plan)
    await _look_for_deltas(world, plan, clients, jobs, memory)
    await _weigh(world, fedround, plan, memory)
    is_announced = _is_announced(fedround, plan)
    if not is_announced and memory.affordable_rounds is None:
        memory.affordable_rounds = await affordable_rounds(world, plan, clients)
    layout = world.settings.layout
    aggregation, evaluation = (_of_stage(jobs, stage) for stage in (names.AGGREGATE, names.EVALUATE))
    manifest_uri, report_uri = layout.aggregate_manifest(plan.run_key), layout.evaluation(plan.run_key)
    aggregate = await _record(world, memory, manifest_uri, aggregation, AggregateManifest)
    is_aggregating = aggregate is None and aggregation.active is not None
    _count_bytes(aggregate, memory)
    return ObservedRound(
        plan=plan,
        clients=clients,
        reserved=frozenset(memory.reserved),
        refused={**invalid, **memory.refused},
        denied=denied,
        training=await _training(world, plan, jobs, denied, memory),
        deltas=dict(memory.deltas),
        aggregate=aggregate,
        progress=await _progress(world, plan.run_key) if is_aggregating else (),
        aggregation=await _attempts(world, aggregation, memory),
        report=await _record(world, memory, report_uri, evaluation, EvaluationReport),
        evaluation=await _attempts(world, evaluation, memory),
        trained_weights=memory.trained_weights,
        affordable_rounds=memory.affordable_rounds,
        is_announced=is_announced,
    )


async def _progress(world: World, run_key: str) -> tuple[ProgressMark, ...]:
    """One listing, and a read for each pod that came further."""
    uri = world.settings.layout.aggregate_records(run_key).progress
    newest = {place.rpartition("/")[0]: place for place in await world.records.names(uri)}
    found = [await world.records.find(place, ProgressMark) for place in newest.values()]
    marks = tuple(mark for mark in found if mark is not None)
    metrics.AGGREGATION_RATE.set(sum(mark.bytes_per_second for mark in marks))
    return marks


def _count_bytes(aggregate: AggregateManifest | None, memory: Memory) -> None:
    if aggregate is None or memory.is_counted:
        return
    memory.is_counted = True
    moved = {"sent": aggregate.delta_bytes, "read": aggregate.bytes_read, "written": aggregate.bytes_written}
    for what, count in moved.items():
        metrics.AGGREGATED_BYTES.labels(what).inc(count)


def _is_announced(fedround: FederatedRound, plan: RoundPlan) -> bool:
    return fedround.status.run_key == plan.run_key and bool(fedround.status.privacy.noise_multiplier)


async def _finished(
    world: World,
    fedround: FederatedRound,
    plan: RoundPlan,
    outcome: RoundOutcome,
    *,
    owner: str,
    memory: Memory,
) -> ObservedRound:
    """What is left to tidy up; nothing else matters any more."""
    if fedround.status.run_key == plan.run_key and is_true(fedround.status.conditions, LEDGERS_CLOSED):
        # Closing again would change nothing, but it would read every ledger at each start of the operator.
        memory.closed.update(planned.client for planned in plan.cohort)
    seen_jobs, denied = await _jobs(world, fedround, plan, outcome, owner)
    jobs = [job for job in seen_jobs if job.namespace not in denied]  # they could not be stopped, either
    return ObservedRound(
        outcome=outcome,
        plan=plan,
        training={planned.client: _of_client(jobs, planned.client) for planned in plan.cohort},
        deltas=dict(memory.deltas),
        aggregation=_of_stage(jobs, names.AGGREGATE),
        evaluation=_of_stage(jobs, names.EVALUATE),
        trained_weights=memory.trained_weights,
        closed=frozenset(memory.closed),
    )


async def _weigh(world: World, fedround: FederatedRound, plan: RoundPlan, memory: Memory) -> None:
    if plan.base_model.uri not in memory.looked:
        memory.looked.add(plan.base_model.uri)
        memory.trained_weights = await trained_weights(world, fedround.spec.method, plan.base_model)


async def _jobs(
    world: World, fedround: FederatedRound, plan: RoundPlan, outcome: RoundOutcome | None, owner: str
) -> tuple[list[ObservedJob], dict[str, Denied]]:
    hub = fedround.metadata.namespace
    namespaces = {hub, *(planned.client.namespace for planned in plan.cohort)}
    if outcome is not None and world.clock() >= outcome.finished_at + _children_lifetime(fedround):
        namespaces = set()  # the Jobs' own time-to-live has removed whatever there was
    denied = await world.jobs.retain(owner, namespaces)
    if hub in denied:
        raise denied[hub].error
    return world.jobs.jobs(namespaces, {names.RUN_KEY: plan.run_key}), denied


def _children_lifetime(fedround: FederatedRound) -> timedelta:
    spec = fedround.spec
    return timedelta(seconds=spec.active_deadline_seconds + spec.ttl_seconds_after_finished)


async def _clients(
    world: World, plan: RoundPlan
) -> tuple[dict[NamespacedName, FederatedClient], dict[NamespacedName, ClientFailure]]:
    """The cohort's objects as they are now, and those that are not valid; their watch keeps them at hand."""
    found: dict[NamespacedName, FederatedClient] = {}
    invalid: dict[NamespacedName, ClientFailure] = {}
    for planned in plan.cohort:
        namespace, name = planned.client.namespace, planned.client.name
        raw = world.cached(CLIENT, namespace, name) or await world.cluster.get(CLIENT, namespace, name)
        client = parsed(raw) if raw is not None else None
        if isinstance(client, FederatedClient):
            found[planned.client] = client
        elif client is not None:
            invalid[planned.client] = failure(planned.client, "ClientInvalid", str(client))
    return found, invalid


def _of_stage(jobs: Iterable[ObservedJob], stage: str) -> Attempts:
    return Attempts(tuple(job for job in jobs if job.stage == stage))


def _of_client(jobs: Iterable[ObservedJob], client: NamespacedName) -> Attempts:
    return Attempts(
        tuple(
            job
            for job in jobs
            if job.stage == names.TRAIN
            and (job.namespace, job.labels.get(names.CLIENT)) == (client.namespace, client.name)
        )
    )


async def _training(
    world: World, plan: RoundPlan, jobs: list[ObservedJob], denied: Mapping[str, Denied], memory: Memory
) -> dict[NamespacedName, Attempts]:
    """Why an attempt failed is asked only where it matters and where we may."""
    by_client = {planned.client: _of_client(jobs, planned.client) for planned in plan.cohort}
    return {
        client: attempts
        if client in memory.deltas or client.namespace in denied
        else await _attempts(world, attempts, memory)
        for client, attempts in by_client.items()
    }


async def _attempts(world: World, attempts: Attempts, memory: Memory) -> Attempts:
    ended = attempts.latest_ended
    if ended is None:
        return attempts
    if ended.uid not in memory.failures:
        memory.failures[ended.uid] = await failure_of(world.cluster, ended)
    return Attempts(attempts.jobs, memory.failures[ended.uid])


async def _look_for_deltas(
    world: World, plan: RoundPlan, clients: Clients, jobs: list[ObservedJob], memory: Memory
) -> None:
    open_ = [planned for planned in plan.cohort if planned.client not in memory.deltas]
    await asyncio.gather(
        *(_look_for_delta(world, p, clients.get(p.client), _of_client(jobs, p.client), memory) for p in open_)
    )


async def _look_for_delta(
    world: World, planned: PlannedClient, client: FederatedClient | None, attempts: Attempts, memory: Memory
) -> None:
    """What is wrong with one client's prefix costs the round that client, and nothing else."""
    uri = world.settings.layout.delta_manifest(planned.client, planned.grant.run_key)
    try:
        manifest = await _record(world, memory, uri, attempts, DeltaManifest)
        if manifest is None:
            return
        receipts.check(manifest, planned.grant, await _receipt_key(world, planned, client))
    except RecordUnreadable as error:
        refused = failure(planned.client, "DeltaUnreadable", str(error))
    except AccessDenied as error:
        message = f"let the hub's identity read the client's deltas and ledger: {error}"
        refused = failure(planned.client, "DeltaDenied", message)
    except (receipts.ReceiptRefused, SignatureRefused) as error:
        refused = failure(planned.client, "ReceiptMismatch", f"{uri}: {error}")
    except LedgerBroken as error:
        refused = failure(planned.client, "LedgerBroken", str(error))
    else:
        memory.deltas[planned.client] = manifest
        return
    memory.refused[planned.client] = refused


async def _receipt_key(world: World, planned: PlannedClient, client: FederatedClient | None) -> str:
    """The key that the worker named in the owner's ledger before its first step; the owner's, if it says."""
    chain = await world.accounting.chain(LedgerRef(planned.ledger_uri, data_set(planned)))
    named = chain.receipt_key(planned.grant.run_key)
    if named is None:
        raise receipts.ReceiptRefused("no worker of this run has launched in the owner's ledger")
    own = client.spec.privacy.receipt_key if client is not None else None
    if own not in (None, named):
        raise receipts.ReceiptRefused(
            f"the owner's spec.privacy.receiptKey is {own}, the worker used {named}"
        )
    return named


async def _record(world: World, memory: Memory, uri: str, attempts: Attempts, model: type[M]) -> M | None:
    """The record that the Jobs should have made. Asked for at first, and once for each Job that ended."""
    ended = attempts.latest_ended
    key = f"{uri} {ended.uid if ended is not None else ''}"
    if key in memory.looked and uri not in memory.looked:
        return None
    found = await world.records.find(uri, model)
    memory.looked.add(key)
    if found is not None:
        memory.looked.add(uri)
    return found
