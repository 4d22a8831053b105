"""One daemon per object of ours: its single writer, woken by events of the object and of its children."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from tributary_operator import metrics, names
from tributary_operator.api import ApiError, Conflict, Deposed, JsonObject, Missing
from tributary_operator.cluster import Target
from tributary_operator.decision import Event
from tributary_operator.kinds import CLIENT, ROUND, Kind
from tributary_operator.reconciler import Pass, Reconciler, World, emit, report, target
from tributary_operator.troubles import trouble
from tributary_store.errors import ObjectExists

BACKOFF_SECONDS_MAX = 60
CONFLICT_SECONDS = 0.2
"""Our picture was old; the watch is about to bring the new one."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Daemon:
    target: Target
    latest: JsonObject
    awake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    pass_started: float | None = None
    failures: int = 0
    heard_of: float = field(default_factory=time.monotonic)
    """When a watch or a read last showed the object."""


class Daemons:
    """All daemons of the operator. Kopf's events come in through `seen`."""

    def __init__(self) -> None:
        self._reconcilers: dict[str, Reconciler] = {}
        self._daemons: dict[str, _Daemon] = {}
        self._world: World | None = None
        self._last_pass_ended = time.monotonic()
        self._is_closed = False

    def start(self, world: World, reconcilers: Iterable[Reconciler]) -> None:
        self._is_closed = False
        self._world = world
        self._reconcilers = {r.kind.kind: r for r in reconcilers}

    @property
    def world(self) -> World:
        if self._world is None:
            raise RuntimeError("the daemons have not been started")
        return self._world

    def seen(self, event_type: str | None, raw: JsonObject) -> None:
        """An object as a list or watch delivered it."""
        if self._is_closed:
            return
        about = target(self._reconcilers[raw["kind"]].kind, raw)
        key = str(about)
        daemon = self._daemons.get(key)
        if _is_news(event_type, raw, daemon):
            self._tell_rounds(about.kind)
        if daemon is not None and (event_type == "DELETED" or daemon.target.uid != about.uid):
            self._stop(key)
            daemon = None
        if event_type == "DELETED":
            return
        if daemon is None:
            daemon = self._daemons[key] = _Daemon(about, raw)
            daemon.task = asyncio.create_task(self._live(daemon), name=key)
            metrics.OBJECTS.labels(about.kind.kind).inc()
        elif _is_newer(raw, daemon.latest):
            if _is_news(event_type, raw, daemon):
                daemon.awake.set()
            daemon.latest, daemon.heard_of = raw, time.monotonic()

    def _tell_rounds(self, kind: Kind) -> None:
        """A client that appears, agrees or withdraws concerns any round; finished ones pass it by."""
        if kind == CLIENT:
            for daemon in self._daemons.values():
                if daemon.target.kind == ROUND:
                    daemon.awake.set()

    def wake(self, owner: str) -> None:
        daemon = self._daemons.get(owner)
        if daemon is not None:
            daemon.awake.set()

    def cached(self, kind: Kind, namespace: str, name: str) -> JsonObject | None:
        daemon = self._daemons.get(names.owner(kind.kind, namespace, name))
        return daemon.latest if daemon is not None else None

    def all(self, kind: Kind) -> list[JsonObject]:
        """Every object of the kind that its watch has delivered so far."""
        return [d.latest for _, d in sorted(self._daemons.items()) if d.target.kind == kind]

    @property
    def longest_pass_seconds(self) -> float:
        """Age of the oldest pass that still runs; 0 when none does."""
        now = time.monotonic()
        return max((now - d.pass_started for d in self._daemons.values() if d.pass_started), default=0.0)

    @property
    def last_pass_age_seconds(self) -> float:
        return time.monotonic() - self._last_pass_ended

    async def close(self) -> None:
        """Stop all of them, and start none until `start` is called again."""
        self._is_closed = True
        tasks = [d.task for d in self._daemons.values() if d.task is not None]
        for key in list(self._daemons):
            self._stop(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop(self, key: str) -> None:
        daemon = self._forget(key)
        if daemon.task is not None:
            daemon.task.cancel()

    def _forget(self, key: str) -> _Daemon:
        daemon = self._daemons.pop(key)
        self.world.jobs.forget(key)
        self._reconcilers[daemon.target.kind.kind].forget(daemon.latest)
        metrics.OBJECTS.labels(daemon.target.kind.kind).dec()
        return daemon

    async def _live(self, daemon: _Daemon) -> None:
        while True:
            daemon.awake.clear()
            wait_seconds = await self._pass(daemon)
            try:
                await asyncio.wait_for(daemon.awake.wait(), wait_seconds)
            except TimeoutError:
                if not await self._is_still_there(daemon):
                    self._retire(daemon)
                    return

    async def _is_still_there(self, daemon: _Daemon) -> bool:
        """After a quiet while the object is read afresh: a watch that is renewed can miss a deletion."""
        about = daemon.target
        if time.monotonic() - daemon.heard_of < self.world.settings.resync_seconds:
            return True
        try:
            raw = await self.world.cluster.get(about.kind, about.namespace, about.name)
        except ApiError as error:
            log.info("object not read afresh", object=str(about), error=str(error))
            return True
        if raw is None or raw["metadata"]["uid"] != about.uid:
            return False
        self._keep(daemon, raw)
        daemon.heard_of = time.monotonic()
        return True

    def _retire(self, daemon: _Daemon) -> None:
        key = str(daemon.target)
        if self._daemons.get(key) is daemon:
            log.warning("object has vanished without an event", object=key)
            self._forget(key)
            self._tell_rounds(daemon.target.kind)

    async def _pass(self, daemon: _Daemon) -> float:
        """One pass, whatever happens in it. Returns the seconds until the next if nothing wakes us."""
        kind = daemon.target.kind.kind
        daemon.pass_started = time.monotonic()
        raw = daemon.latest
        try:
            done = await self._reconcile(raw)
        except (Conflict, Deposed, ObjectExists) as error:
            log.debug("the object has changed meanwhile", object=str(daemon.target), error=str(error))
            metrics.PASSES.labels(kind, "conflict").inc()
            return CONFLICT_SECONDS
        except Exception as error:  # a daemon that ended would leave its object alone for ever
            metrics.PASSES.labels(kind, "error").inc()
            return await self._failed(daemon, raw, error)
        finally:
            metrics.PASS_SECONDS.labels(kind).observe(time.monotonic() - daemon.pass_started)
            daemon.pass_started, self._last_pass_ended = None, time.monotonic()
        daemon.failures = 0
        metrics.PASSES.labels(kind, "ok").inc()
        self._keep(daemon, done.raw)
        resync = timedelta(seconds=self.world.settings.resync_seconds)
        return (done.poll_after if done.poll_after is not None else resync).total_seconds()

    async def _reconcile(self, raw: JsonObject) -> Pass:
        reconciler = self._reconcilers[raw["kind"]]
        if "deletionTimestamp" in raw["metadata"]:
            return await self._finalize(reconciler, raw)
        finalizers = raw["metadata"].get("finalizers", [])
        if reconciler.has_finalizer and names.FINALIZER not in finalizers:
            # Before anything is started, so that nothing can be left behind.
            raw = await self.world.cluster.set_finalizers(
                raw, reconciler.kind, [*finalizers, names.FINALIZER]
            )
        return await reconciler.run_pass(raw)

    async def _finalize(self, reconciler: Reconciler, raw: JsonObject) -> Pass:
        finalizers = raw["metadata"].get("finalizers", [])
        if names.FINALIZER not in finalizers:
            return Pass(raw)
        left = await self._clean_up(reconciler, raw)
        if left:
            message = f"left behind, each ends by its own deadline: {', '.join(left)}"
            log.warning("children could not be removed", object=str(target(reconciler.kind, raw)), left=left)
            event = Event("ChildrenLeft", message, "Warning")
            await emit(self.world, target(reconciler.kind, raw), (event,))
        others = [f for f in finalizers if f != names.FINALIZER]
        return Pass(await self.world.cluster.set_finalizers(raw, reconciler.kind, others))

    async def _clean_up(self, reconciler: Reconciler, raw: JsonObject) -> list[str]:
        """What was left behind. Bounded: an unreachable namespace must not hold up a deletion for ever."""
        try:
            async with asyncio.timeout(self.world.settings.cleanup_timeout_seconds):
                return await reconciler.clean_up(raw)
        except TimeoutError:
            return [f"children of {target(reconciler.kind, raw)} (time ran out)"]

    async def _failed(self, daemon: _Daemon, raw: JsonObject, error: Exception) -> float:
        found = trouble(error)
        daemon.failures += 1
        is_ours = found.reason == "InternalError"
        log.warning(
            "pass failed",
            object=str(daemon.target),
            reason=found.reason,
            error=found.message,
            exc_info=is_ours,
        )
        try:
            kind = self._reconcilers[raw["kind"]].kind
            self._keep(daemon, await report(self.world, kind, daemon.latest, found))
        except Conflict:
            return CONFLICT_SECONDS
        except Missing:
            daemon.heard_of = -math.inf  # gone, it seems: makes the daemon look before the next pass
            return CONFLICT_SECONDS
        except Exception as unreported:  # whatever it is, the daemon must live on
            log.warning("trouble not reported", object=str(daemon.target), error=str(unreported))
        return float(min(2 ** min(daemon.failures, 10), BACKOFF_SECONDS_MAX))

    def _keep(self, daemon: _Daemon, raw: JsonObject) -> None:
        if _is_newer(raw, daemon.latest):
            daemon.latest, daemon.heard_of = raw, time.monotonic()


def _is_newer(raw: JsonObject, than: JsonObject) -> bool:
    # etcd revisions: the API server's own comparison of resource versions is numeric, too.
    return int(raw["metadata"]["resourceVersion"]) > int(than["metadata"]["resourceVersion"])


def _is_news(event_type: str | None, raw: JsonObject, daemon: _Daemon | None) -> bool:
    """Whether more than the status has changed, which we write ourselves."""
    if daemon is None or event_type == "DELETED":
        return True
    return _is_newer(raw, daemon.latest) and _without_status(raw) != _without_status(daemon.latest)


def _without_status(raw: JsonObject) -> JsonObject:
    ignored = {"resourceVersion", "managedFields"}
    metadata = {k: v for k, v in raw["metadata"].items() if k not in ignored}
    return {"metadata": metadata, "spec": raw.get("spec")}
