"""Jobs as decisions see them, and the watches that keep them up to date and wake their owners' daemons."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Self

import structlog

from tributary_operator import names
from tributary_operator.api import ApiError, Expired, Forbidden, JsonObject, Unreachable
from tributary_operator.cluster import Cluster, selector
from tributary_operator.decision import Delete
from tributary_operator.kinds import JOB

RETRY_SECONDS_MAX = 30
SYNC_TIMEOUT_SECONDS = 20
MANAGED = {names.MANAGED_BY: names.MANAGED_BY_VALUE}

log = structlog.get_logger()


class JobState(Enum):
    PENDING = "pending"
    """No pod is ready yet."""
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPING = "stopping"
    """Deleted, but its pods may still run."""


@dataclass(frozen=True, slots=True)
class ObservedJob:
    """What decisions ask about a Job."""

    namespace: str
    name: str
    uid: str
    stage: str
    attempt: int
    state: JobState
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    reason: str = ""
    """Of a failed Job: its condition's reason, for example DeadlineExceeded."""
    message: str = ""

    @classmethod
    def of(cls, raw: JsonObject) -> Self:
        metadata, labels = raw["metadata"], raw["metadata"].get("labels", {})
        state, reason, message = _state(raw)
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            stage=labels.get(names.STAGE, ""),
            attempt=_number(labels.get(names.ATTEMPT, "0")),
            state=state,
            labels=labels,
            reason=reason,
            message=message,
        )

    @property
    def is_active(self) -> bool:
        """Its pods run, will run, or may still run."""
        return self.state in {JobState.PENDING, JobState.RUNNING, JobState.STOPPING}

    @property
    def deletion(self) -> Delete:
        return Delete(JOB, self.namespace, self.name, self.uid)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _state(raw: JsonObject) -> tuple[JobState, str, str]:
    status = raw.get("status", {})
    if "deletionTimestamp" in raw["metadata"]:
        return JobState.STOPPING, "", ""
    for condition in status.get("conditions", []):
        if condition["status"] == "True" and condition["type"] in {"Complete", "Failed"}:
            state = JobState.SUCCEEDED if condition["type"] == "Complete" else JobState.FAILED
            return state, condition.get("reason", ""), condition.get("message", "")
    return (JobState.RUNNING if status.get("ready", 0) else JobState.PENDING), "", ""


@dataclass(frozen=True, slots=True)
class Denied:
    """A namespace whose Jobs we may not read, without a break since this time."""

    since: datetime
    error: Forbidden


@dataclass(slots=True)
class _Watched:
    """The Jobs of one namespace, as the watch has left them."""

    task: asyncio.Task[None] | None = None
    jobs: dict[str, ObservedJob] = field(default_factory=dict[str, ObservedJob])
    owners: dict[str, str] = field(default_factory=dict[str, str])
    looked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after the first attempt to list, successful or not."""
    is_listed: bool = False
    """There is a picture; it stays while the watch is broken."""
    error: ApiError | None = None
    """Why there is no picture, or why there is no newer one; ends with the next list."""
    denied: Denied | None = None


class JobWatches:
    """One list-and-watch of our Jobs per namespace, for as long as an owner's daemon is interested."""

    def __init__(
        self,
        cluster: Cluster,
        watch_timeout_seconds: int,
        wake: Callable[[str], None],
        clock: Callable[[], datetime],
    ) -> None:
        self._cluster = cluster
        self._timeout_seconds = watch_timeout_seconds
        self._wake = wake
        self._clock = clock
        self._watched: dict[str, _Watched] = {}
        self._interests: dict[str, frozenset[str]] = {}

    async def retain(self, owner: str, namespaces: Iterable[str]) -> dict[str, Denied]:
        """Watch these namespaces for the owner, and no others. Returns those that we may not read.

        Raises:
            ApiError: there is no picture of a namespace for another reason; that says nothing about it.
        """
        self._interests[owner] = frozenset(namespaces)
        self._stop_unused()
        wanted = sorted(self._interests[owner])
        for namespace in wanted:
            self._start(namespace)
        await asyncio.gather(*(self._first_look(namespace) for namespace in wanted))
        return {ns: denied for ns in wanted if (denied := self._denied(ns)) is not None}

    def _denied(self, namespace: str) -> Denied | None:
        watched = self._watched[namespace]
        if watched.denied is None and watched.error is not None and not watched.is_listed:
            raise watched.error
        return watched.denied

    def forget(self, owner: str) -> None:
        self._interests.pop(owner, None)
        self._stop_unused()

    def jobs(self, namespaces: Iterable[str], labels: Mapping[str, str]) -> list[ObservedJob]:
        """Jobs that carry the labels, in order of name."""
        return [
            job
            for namespace in sorted(set(namespaces))
            for _, job in sorted(self._watched.get(namespace, _Watched()).jobs.items())
            if labels.items() <= job.labels.items()
        ]

    @property
    def count(self) -> int:
        return len(self._watched)

    async def close(self) -> None:
        self._interests.clear()
        tasks = [w.task for w in self._watched.values() if w.task is not None]
        self._stop_unused()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop_unused(self) -> None:
        used: set[str] = set().union(*self._interests.values())
        for namespace in self._watched.keys() - used:
            task = self._watched.pop(namespace).task
            if task is not None:
                task.cancel()

    def _start(self, namespace: str) -> None:
        if namespace not in self._watched:
            watched = self._watched[namespace] = _Watched()
            watched.task = asyncio.create_task(self._follow(namespace, watched), name=f"jobs of {namespace}")

    async def _first_look(self, namespace: str) -> None:
        watched = self._watched[namespace]
        try:
            await asyncio.wait_for(watched.looked.wait(), SYNC_TIMEOUT_SECONDS)
        except TimeoutError:
            watched.error = Unreachable(f"Jobs of {namespace} could not be listed in time")

    async def _follow(self, namespace: str, watched: _Watched) -> None:
        delay = 1
        while True:
            try:
                version = await self._list(namespace, watched)
                delay = 1
                while True:
                    version = await self._watch(namespace, watched, version)
            except Expired:
                continue
            except ApiError as error:
                self._note(watched, error)
                log.info("jobs are not readable", namespace=namespace, error=str(error), retry_seconds=delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, RETRY_SECONDS_MAX)

    async def _list(self, namespace: str, watched: _Watched) -> str:
        items, version = await self._cluster.find(JOB, namespace, MANAGED)
        gone = watched.jobs.keys() - {raw["metadata"]["name"] for raw in items}
        for raw in items:
            self._take(watched, raw)
        for name in gone:
            self._drop(watched, name)
        watched.is_listed = True
        watched.looked.set()
        if watched.error is not None:
            watched.error = watched.denied = None
            self._wake_interested(namespace)
        return version

    def _note(self, watched: _Watched, error: ApiError) -> None:
        """A refusal counts from its first time; until the next list nothing else makes up for it."""
        watched.error = error
        watched.looked.set()
        if isinstance(error, Forbidden):
            since = watched.denied.since if watched.denied is not None else self._clock()
            watched.denied = Denied(since, error)

    def _wake_interested(self, namespace: str) -> None:
        for owner in [o for o, namespaces in self._interests.items() if namespace in namespaces]:
            self._wake(owner)

    async def _watch(self, namespace: str, watched: _Watched, version: str) -> str:
        query = {"labelSelector": selector(MANAGED), "resourceVersion": version}
        async for event in self._cluster.api.watch(JOB.path(namespace), query, self._timeout_seconds):
            raw = event["object"]
            version = raw["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self._drop(watched, raw["metadata"]["name"])
            elif event["type"] != "BOOKMARK":
                self._take(watched, raw)
        return version

    def _take(self, watched: _Watched, raw: JsonObject) -> None:
        name, job = raw["metadata"]["name"], ObservedJob.of(raw)
        owner = raw["metadata"].get("annotations", {}).get(names.OWNER, "")
        changed = watched.jobs.get(name) != job
        watched.jobs[name], watched.owners[name] = job, owner
        if changed:
            self._wake(owner)

    def _drop(self, watched: _Watched, name: str) -> None:
        if watched.jobs.pop(name, None) is not None:
            self._wake(watched.owners.pop(name, ""))
