"""Looks at a release's world: its model, the records about it, its Deployments and its Service."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from tributary_api.records import CompressionManifest, GateVerdict
from tributary_api.release import ModelRelease, Revision
from tributary_api.shared import ModelRef
from tributary_operator import names
from tributary_operator.api import JsonObject
from tributary_operator.kinds import DEPLOYMENT, DISRUPTION_BUDGET, RELEASE, SERVICE
from tributary_operator.reconciler import World
from tributary_operator.releases import identity
from tributary_operator.releases.observed import ObservedRelease, ObservedRevision, ObservedService, Source
from tributary_operator.releases.situation import Situation
from tributary_operator.rounds.models import resolve
from tributary_operator.rounds.observed import Attempts, WorkerFailure
from tributary_operator.rounds.workers import failure_of
from tributary_store import bundle


@dataclass(slots=True)
class Memory:
    """What need not be asked again. All of it can be lost."""

    failures: dict[str, WorkerFailure] = field(default_factory=dict[str, WorkerFailure])
    """Of Jobs, by UID."""
    sources: dict[str, Source] = field(default_factory=dict[str, Source])
    """Models that were found, by the JSON of what names them."""
    has_disruption_budget: bool = False


async def observe(world: World, release: ModelRelease, memory: Memory) -> Situation:
    namespace = release.metadata.namespace
    owner = names.owner(RELEASE.kind, namespace, release.metadata.name)
    # Jobs before records: a Job that ended in this picture has written its record before we look for it.
    denied = await world.jobs.retain(owner, {namespace})
    if namespace in denied:
        raise denied[namespace].error
    labels = names.release_labels(release, names.SERVE)
    deployments, _ = await world.cluster.find(DEPLOYMENT, namespace, labels)
    service, others = await _services(world, release)
    seen = ObservedRelease(
        source=await _source(world, release, memory),
        revisions=_revisions(deployments),
        service=service,
        other_services=others,
        has_disruption_budget=await _has_disruption_budget(world, release, memory),
    )
    return await _with_records(world, Situation(release, seen, world.settings, world.clock()), memory)


async def _source(world: World, release: ModelRelease, memory: Memory) -> Source:
    """Resolved once: a round's outcome and a bundle never change."""
    asked = release.spec.model.canonical_json().decode()
    if asked not in memory.sources:
        found = await resolve(world, release.metadata.namespace, release.spec.model)
        model = found.ref or _resolved_before(release)
        if model is None:
            return Source(reason=found.reason, message=found.message, is_stalled=found.is_stalled)
        memory.sources[asked] = Source(model, await _weight_bytes(world, model))
    return memory.sources[asked]


def _resolved_before(release: ModelRelease) -> ModelRef | None:
    """What the present spec named when it was seen first; the round may be gone by now."""
    is_same_spec = release.status.observed_generation == release.metadata.generation
    return release.status.model if is_same_spec else None


async def _weight_bytes(world: World, model: ModelRef) -> int:
    manifest = await world.records.in_thread(bundle.read_manifest, world.records.store, model)
    return bundle.weight_bytes(manifest)


async def _has_disruption_budget(world: World, release: ModelRelease, memory: Memory) -> bool:
    if not memory.has_disruption_budget:
        name = names.disruption_budget(release)
        found = await world.cluster.get(DISRUPTION_BUDGET, release.metadata.namespace, name)
        memory.has_disruption_budget = found is not None
    return memory.has_disruption_budget


async def _with_records(world: World, s: Situation, memory: Memory) -> Situation:
    """Adds the records about the candidate; those about a revision that serves are not needed any more."""
    parent = s.seen.source.model
    if parent is None or s.target == s.stable:
        return s
    layout = world.settings.layout
    if s.release.spec.compression:
        key = identity.compression_key(s.release, parent, s.settings)
        manifest = await world.records.find(layout.compression_manifest(key), CompressionManifest)
        compressing = await _attempts(world, s.release, names.COMPRESS, key, memory=memory)
        s = s.with_seen(compression=manifest, compressing=compressing)
    if s.candidate_model is None:
        return s
    key = identity.gate_key(s.release, s.candidate_model, parent, s.rivals, s.settings)
    verdict = await world.records.find(layout.gate_verdict(key), GateVerdict)
    gating = await _attempts(world, s.release, names.GATE, key, memory=memory)
    return s.with_seen(verdict=verdict, gating=gating)


async def _attempts(world: World, release: ModelRelease, stage: str, key: str, *, memory: Memory) -> Attempts:
    labels = {**names.release_labels(release, stage), names.RECORD: key}
    attempts = Attempts(tuple(world.jobs.jobs([release.metadata.namespace], labels)))
    ended = attempts.latest_ended
    if ended is None:
        return attempts
    if ended.uid not in memory.failures:
        memory.failures[ended.uid] = await failure_of(world.cluster, ended)
    return Attempts(attempts.jobs, memory.failures[ended.uid])


def _revisions(deployments: list[JsonObject]) -> dict[str, ObservedRevision]:
    found = (observed_revision(raw) for raw in deployments if "deletionTimestamp" not in raw["metadata"])
    return {revision.record.revision: revision for revision in found if revision is not None}


def observed_revision(raw: JsonObject) -> ObservedRevision | None:
    """A Deployment of ours; None for one whose record has been tampered with."""
    metadata, spec, status = raw["metadata"], raw["spec"], raw.get("status", {})
    try:
        record = Revision.model_validate_json(metadata.get("annotations", {}).get(names.REVISION_RECORD, ""))
    except ValidationError:
        return None
    replicas, ready = spec.get("replicas", 1), status.get("readyReplicas", 0)
    counts = {status.get("replicas", 0), status.get("updatedReplicas", 0), status.get("availableReplicas", 0)}
    return ObservedRevision(
        record=record,
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        replicas=replicas,
        ready=ready,
        is_settled=status.get("observedGeneration", 0) >= metadata["generation"] and counts == {replicas},
        problem=_problem(status),
    )


def _problem(status: JsonObject) -> str:
    """Kubernetes has waited for spec.progressDeadlineSeconds, or may not make pods at all."""
    for condition in status.get("conditions", []):
        if condition["type"] == "Progressing" and condition["status"] == "False":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}"
    return ""


async def _services(
    world: World, release: ModelRelease
) -> tuple[ObservedService | None, tuple[ObservedService, ...]]:
    """The Service that the spec names, whoever it belongs to, and ours under other names."""
    namespace, name = release.metadata.namespace, release.spec.serving.service_name
    items, _ = await world.cluster.find(SERVICE, namespace, names.release_labels(release, names.SERVE))
    ours = {raw["metadata"]["name"]: observed_service(raw, is_ours=True) for raw in items}
    others = tuple(found for other, found in sorted(ours.items()) if other != name)
    if name in ours:
        return ours[name], others
    raw = await world.cluster.get(SERVICE, namespace, name)
    return (observed_service(raw, is_ours=False) if raw is not None else None), others


def observed_service(raw: JsonObject, *, is_ours: bool) -> ObservedService:
    metadata, spec = raw["metadata"], raw["spec"]
    ports: list[dict[str, Any]] = spec.get("ports") or [{}]
    return ObservedService(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        revision=(spec.get("selector") or {}).get(names.REVISION, ""),
        port=ports[0].get("port", 0),
        is_ours=is_ours,
    )
