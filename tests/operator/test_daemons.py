"""The life of a daemon: when it passes over its object, and that nothing makes it stop for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from round_worlds import SETTINGS

from tributary_operator import names
from tributary_operator.api import ApiError, Conflict, Forbidden, JsonObject, Missing
from tributary_operator.daemons import Daemons
from tributary_operator.kinds import CLIENT, ROUND, Kind
from tributary_operator.reconciler import Pass, World
from tributary_store.errors import StoreUnreachable

WAIT_SECONDS = 3.0


async def eventually(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not check():
            await asyncio.sleep(0.005)


def an_object(kind: Kind = ROUND, *, uid: str = "u1", version: int = 1, **metadata: Any) -> JsonObject:
    about = {"name": "r1", "namespace": "hub", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"kind": kind.kind, "metadata": {**about, **metadata}, "spec": {}, "status": {}}


@dataclass
class Api:
    """The objects of an API server, as far as a daemon asks for them."""

    there: dict[str, JsonObject] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    async def get(self, kind: Kind, namespace: str, name: str) -> JsonObject | None:
        return self.there.get(kind.kind)

    async def set_finalizers(self, raw: JsonObject, kind: Kind, finalizers: list[str]) -> JsonObject:
        return self._changed(raw, metadata={**raw["metadata"], "finalizers": finalizers})

    async def patch_status(self, raw: JsonObject, kind: Kind, status: JsonObject) -> JsonObject:
        if kind.kind not in self.there:
            raise Missing("not found")
        return self._changed(raw, status=status)

    async def emit(self, target: Any, event: Any, now: datetime) -> None:
        self.events.append(event.reason)

    def _changed(self, raw: JsonObject, **parts: Any) -> JsonObject:
        version = int(raw["metadata"]["resourceVersion"]) + 1
        changed = {**raw, **parts}
        changed["metadata"] = {**changed["metadata"], "resourceVersion": str(version)}
        self.there[raw["kind"]] = changed
        return changed


class Watches:
    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def forget(self, owner: str) -> None:
        self.forgotten.append(owner)


@dataclass
class Passes:
    """A reconciler that notes its passes, and does what it is told."""

    kind: Kind = ROUND
    has_finalizer: bool = True
    seen: list[JsonObject] = field(default_factory=list)
    cleaned: int = 0
    errors: list[Exception] = field(default_factory=list)
    poll_after: timedelta | None = None
    gate: asyncio.Event | None = None
    running: int = 0
    left: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    async def run_pass(self, raw: JsonObject) -> Pass:
        self.running += 1
        assert self.running == 1, "two passes over one object at once"
        try:
            self.seen.append(raw)
            if self.gate is not None:
                await self.gate.wait()
            if self.errors:
                raise self.errors.pop(0)
        finally:
            self.running -= 1
        return Pass(raw, self.poll_after)

    async def clean_up(self, raw: JsonObject) -> list[str]:
        self.cleaned += 1
        if self.gate is not None:
            await self.gate.wait()
        return self.left

    def forget(self, raw: JsonObject) -> None:
        self.forgotten.append(raw["metadata"]["uid"])


@dataclass
class Stage:
    daemons: Daemons
    api: Api
    passes: Passes
    watches: Watches


@pytest.fixture
async def stage() -> Any:
    made = on_stage(Passes())
    yield made
    await made.daemons.close()


def on_stage(passes: Passes, **settings: Any) -> Stage:
    daemons, api, watches = Daemons(), Api(), Watches()
    world: Any = World(
        settings=SETTINGS.model_copy(update=settings),
        cluster=api,  # type: ignore[arg-type]
        jobs=watches,  # type: ignore[arg-type]
        records=None,  # type: ignore[arg-type]
        accounting=None,  # type: ignore[arg-type]
        clock=lambda: datetime.now(UTC),
        wake=daemons.wake,
        cached=daemons.cached,
    )
    others = Passes(kind=CLIENT, has_finalizer=False)
    daemons.start(world, [passes, others])
    return Stage(daemons, api, passes, watches)


KEY = names.owner("FederatedRound", "hub", "r1")


async def test_the_finalizer_is_set_before_the_first_pass(stage: Stage) -> None:
    stage.daemons.seen(None, an_object())
    await eventually(lambda: bool(stage.passes.seen))
    assert stage.passes.seen[0]["metadata"]["finalizers"] == [names.FINALIZER]


async def test_our_own_status_wakes_nobody_and_a_new_spec_does(stage: Stage) -> None:
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: len(stage.passes.seen) == 1)
    told = {**an_object(version=5, finalizers=[names.FINALIZER]), "status": {"runKey": "x"}}
    stage.daemons.seen("MODIFIED", told)
    await asyncio.sleep(0.05)
    assert len(stage.passes.seen) == 1
    stage.daemons.seen(
        "MODIFIED", {**told, "metadata": {**told["metadata"], "resourceVersion": "6", "generation": 2}}
    )
    await eventually(lambda: len(stage.passes.seen) == 2)


async def test_an_old_event_does_not_bring_back_an_old_object(stage: Stage) -> None:
    stage.daemons.seen(None, an_object(version=9, finalizers=[names.FINALIZER], generation=3))
    await eventually(lambda: len(stage.passes.seen) == 1)
    stage.daemons.seen("MODIFIED", an_object(version=7, generation=2))
    stage.daemons.wake(KEY)
    await eventually(lambda: len(stage.passes.seen) == 2)
    assert stage.passes.seen[1]["metadata"]["generation"] == 3


async def test_being_woken_during_a_pass_leads_to_one_more(stage: Stage) -> None:
    stage.passes.gate = asyncio.Event()
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: len(stage.passes.seen) == 1)
    for _ in range(3):
        stage.daemons.wake(KEY)
    stage.passes.gate.set()
    await eventually(lambda: len(stage.passes.seen) == 2)
    await asyncio.sleep(0.05)
    assert len(stage.passes.seen) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StoreUnreachable("no answer"), "StoreUnreachable"),
        (Forbidden("no"), "NoAccess"),
        (ValueError("a fault of ours"), "InternalError"),
    ],
)
async def test_an_error_is_told_and_survived(stage: Stage, error: Exception, reason: str) -> None:
    stage.passes.errors = [error]
    stage.api.there["FederatedRound"] = an_object()
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: stage.api.events == [reason])
    conditions = {c["type"]: c for c in stage.api.there["FederatedRound"]["status"]["conditions"]}
    assert (conditions["Ready"]["status"], conditions["Ready"]["reason"]) == ("False", reason)
    stage.daemons.wake(KEY)
    await eventually(lambda: len(stage.passes.seen) == 2)


async def test_a_conflict_is_tried_again_at_once_and_not_told(stage: Stage) -> None:
    stage.passes.errors = [Conflict("changed")]
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: len(stage.passes.seen) == 2)
    assert stage.api.events == []


async def test_deletion_cleans_up_and_then_lets_go(stage: Stage) -> None:
    stage.passes.left = ["elsewhere (forbidden)"]
    deleted = an_object(finalizers=["other", names.FINALIZER], deletionTimestamp="2026-01-01T00:00:00Z")
    stage.daemons.seen(None, deleted)
    await eventually(lambda: "FederatedRound" in stage.api.there)
    assert stage.passes.seen == []
    assert stage.passes.cleaned == 1
    assert stage.api.there["FederatedRound"]["metadata"]["finalizers"] == ["other"]
    assert stage.api.events == ["ChildrenLeft"]


async def test_a_clean_up_that_hangs_holds_up_nothing() -> None:
    passes = Passes(gate=asyncio.Event())
    made = on_stage(passes, cleanup_timeout_seconds=0.05)
    deleted = an_object(finalizers=[names.FINALIZER], deletionTimestamp="2026-01-01T00:00:00Z")
    made.daemons.seen(None, deleted)
    await eventually(lambda: "FederatedRound" in made.api.there)
    assert made.api.there["FederatedRound"]["metadata"]["finalizers"] == []
    await made.daemons.close()


async def test_a_namesake_gets_a_daemon_of_its_own(stage: Stage) -> None:
    stage.passes.gate = asyncio.Event()  # the first hangs in its pass
    stage.daemons.seen(None, an_object(uid="u1", finalizers=[names.FINALIZER]))
    await eventually(lambda: len(stage.passes.seen) == 1)
    stage.daemons.seen("ADDED", an_object(uid="u2", version=2, finalizers=[names.FINALIZER]))
    await eventually(lambda: len(stage.passes.seen) == 2)
    assert stage.passes.seen[1]["metadata"]["uid"] == "u2"
    assert stage.watches.forgotten == [KEY]


async def test_an_object_that_vanished_without_an_event_is_let_go() -> None:
    passes = Passes(poll_after=timedelta(seconds=0.01))
    made = on_stage(passes, resync_seconds=0.05)
    made.api.there["FederatedRound"] = an_object(finalizers=[names.FINALIZER])
    made.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: len(passes.seen) > 8)
    assert made.daemons.cached(ROUND, "hub", "r1") is not None
    made.api.there.clear()
    await eventually(lambda: made.daemons.cached(ROUND, "hub", "r1") is None)
    count = len(passes.seen)
    await asyncio.sleep(0.05)
    assert len(passes.seen) == count


async def test_errors_about_an_object_that_is_gone_end_its_daemon() -> None:
    passes = Passes(errors=[ApiError("gone")] * 100)
    made = on_stage(passes)
    made.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: made.daemons.cached(ROUND, "hub", "r1") is None)
    assert len(passes.seen) == 1


@pytest.mark.parametrize("event", ["ADDED", "DELETED"])
async def test_rounds_hear_of_clients(stage: Stage, event: str) -> None:
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    client = an_object(CLIENT)
    if event == "DELETED":
        stage.daemons.seen(None, client)
    await eventually(lambda: bool(stage.passes.seen))
    await asyncio.sleep(0.02)
    before = len(stage.passes.seen)
    stage.daemons.seen(event, client)
    await eventually(lambda: len(stage.passes.seen) == before + 1)


async def test_an_object_that_is_gone_is_forgotten(stage: Stage) -> None:
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    stage.daemons.seen("DELETED", an_object(version=2))
    assert stage.passes.forgotten == ["u1"]
    stage.daemons.seen("ADDED", an_object(uid="u2", version=3))
    stage.daemons.seen("ADDED", an_object(uid="u3", version=4))
    assert stage.passes.forgotten == ["u1", "u2"]


async def test_health_tells_of_a_pass_that_hangs(stage: Stage) -> None:
    stage.passes.gate = asyncio.Event()
    stage.daemons.seen(None, an_object(finalizers=[names.FINALIZER]))
    await eventually(lambda: stage.daemons.longest_pass_seconds > 0.02)
    stage.passes.gate.set()
    await eventually(lambda: stage.daemons.longest_pass_seconds == 0)
    assert stage.daemons.last_pass_age_seconds < WAIT_SECONDS
