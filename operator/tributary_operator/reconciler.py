"""What a kind must provide, and how a decision is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from tributary_api.base import ApiModel
from tributary_api.meta import Condition
from tributary_operator import conditions
from tributary_operator.accounting import Accounting
from tributary_operator.api import ApiError, JsonObject
from tributary_operator.cluster import Cluster, Target
from tributary_operator.decision import Apply, Decision, Event, JsonPatch, LedgerRecord, PutRecord, Record
from tributary_operator.jobs import JobWatches
from tributary_operator.kinds import Kind
from tributary_operator.settings import Settings
from tributary_operator.store import Records
from tributary_operator.troubles import Trouble

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class World:
    """Everything outside of the pure core."""

    settings: Settings
    cluster: Cluster
    jobs: JobWatches
    records: Records
    accounting: Accounting
    clock: Callable[[], datetime]
    wake: Callable[[str], None]
    """Wakes the daemon of an owner, given as names.owner(kind, namespace, name)."""
    cached: Callable[[Kind, str, str], JsonObject | None]
    """An object of ours as its watch saw it last, or None."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The end of a pass: the object as it is now, and when to look again if nothing wakes us."""

    raw: JsonObject
    poll_after: timedelta | None = None


class Reconciler(Protocol):
    """One kind of ours. Its daemon calls in here, never twice at the same time for one object."""

    kind: Kind
    has_finalizer: bool

    async def run_pass(self, raw: JsonObject) -> Pass:
        """Observe, decide, carry out."""

    async def clean_up(self, raw: JsonObject) -> list[str]:
        """Remove what the object leaves behind. Returns what could not be reached."""

    def forget(self, raw: JsonObject) -> None:
        """The object is gone: drop what is remembered about it. Without a finalizer nothing else says so."""


def target(kind: Kind, raw: JsonObject) -> Target:
    metadata = raw["metadata"]
    return Target(kind, metadata["namespace"], metadata["name"], metadata["uid"])


class Effects(Protocol):
    """What a kind does in its own way while a decision is carried out."""

    async def record(self, entry: LedgerRecord) -> None:
        """Write a ledger entry."""

    def refused(self, child: Apply, error: ApiError) -> bool:
        """True if the refusal has been noted and the pass may go on."""


class PlainEffects:
    """Of a kind that has no ledger and no child that it could do without."""

    async def record(self, entry: LedgerRecord) -> None:
        raise TypeError(f"this kind writes no ledger entries: {entry}")

    def refused(self, child: Apply, error: ApiError) -> bool:  # noqa: ARG002 - the protocol's
        return False


async def carry_out(
    world: World,
    kind: Kind,
    raw: JsonObject,
    decision: Decision[ApiModel],
    effects: Effects | None = None,
) -> Pass:
    """Records, children, deletions, status, events: in this order, stopping at the first failure."""
    own = effects if effects is not None else PlainEffects()
    for record in decision.record:
        await _record(world, record, own)
    for child in decision.apply:
        await _apply(world, child, own)
    for deletion in decision.delete:
        await world.cluster.delete(deletion)
    after = await world.cluster.patch_status(raw, kind, decision.status.to_json_object())
    await emit(world, target(kind, raw), decision.events)
    return Pass(after, decision.poll_after)


async def _record(world: World, record: Record, effects: Effects) -> None:
    if isinstance(record, PutRecord):
        await world.records.put(record.uri, record.body)
    else:
        await effects.record(record)


async def _apply(world: World, child: Apply, effects: Effects) -> None:
    try:
        if isinstance(child, JsonPatch):
            await world.cluster.json_patch(child)
        else:
            await world.cluster.apply(child)
    except ApiError as error:
        if not effects.refused(child, error):
            raise


async def emit(world: World, about: Target, events: tuple[Event, ...]) -> None:
    """Events are for people; a pass does not fail for them."""
    for event in events:
        try:
            await world.cluster.emit(about, event, world.clock())
        except ApiError as error:
            log.warning("event not recorded", object=str(about), reason=event.reason, error=str(error))


async def report(world: World, kind: Kind, raw: JsonObject, found: Trouble) -> JsonObject:
    """The object with the trouble in its conditions; everything else in the status stays."""
    status = raw.get("status", {})
    old = [Condition.model_validate(c) for c in status.get("conditions", [])]
    before = conditions.find(old, conditions.READY)
    ready = before.status if before is not None and before.status == "True" else "False"
    generation = raw["metadata"].get("generation", 1)
    new = conditions.summary(
        found.progress, ready, found.reason, found.message, generation=generation, now=world.clock()
    )
    merged = conditions.merged(old, new)
    after = {**status, "conditions": [c.to_json_object() for c in merged]}
    patched = await world.cluster.patch_status(raw, kind, after)
    await emit(world, target(kind, raw), conditions.transition(old, merged))
    return patched
