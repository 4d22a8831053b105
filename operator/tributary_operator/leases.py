"""Who of several operators leads: the one that holds the Lease, in the manner of client-go's leader election.

The times in the Lease are for people. A candidate goes by its own clock alone: it takes over when it has
seen no change of the Lease for as long as the holder claimed it. The holder counts from before it *sent* its
last renewal, so it has stopped before anybody else may start. Clocks must run equally fast, not agree.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from typing import Protocol

import structlog

from tributary_operator import names
from tributary_operator.api import ApiError, Conflict, Deposed, Invalid, JsonObject, Missing, Query
from tributary_operator.kinds import LEASE

RELEASED_SECONDS = 1
"""Duration of a Lease that nobody holds: the API wants one above zero."""

HURRY = 0.3
"""Of a retry period: until the next attempt after a failed one; several fit before the leader stops."""
ATTEMPT = 0.5
"""Of a retry period: the longest that one attempt may take."""

PAUSE_SECONDS_MIN = 0.01
"""What is left of a time can be too small for a clock to show."""

log = structlog.get_logger()


class LeaseApi(Protocol):
    """What an election asks of the API server."""

    async def request(
        self, verb: str, path: str, *, query: Query | None = None, body: JsonObject | None = None
    ) -> JsonObject:
        """The answer's object, or an ApiError."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """In seconds, each shorter than the one before."""

    duration: int
    """Others wait for this long after the last change that they have seen."""
    renew: float
    """The holder stops when no renewal has succeeded for this long."""
    retry: float
    """Between two attempts that succeed."""


class Fence:
    """Open while this operator may write. Every writing request passes here right before it is sent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open_until = -inf

    def open_until(self, moment: float) -> None:
        self._open_until = moment

    def close(self) -> None:
        self._open_until = -inf

    @property
    def is_open(self) -> bool:
        return self.remaining_seconds > 0

    @property
    def remaining_seconds(self) -> float:
        return self._open_until - self._clock()

    def check(self) -> None:
        """Raises Deposed when the Lease was not renewed in time, even if nobody has noticed yet."""
        if not self.is_open:
            raise Deposed("this operator does not hold the Lease, so it writes nothing")


class Election:
    """One candidate for one Lease."""

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        identity: str,
        times: LeaseTimes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`identity` must be no other running process's; a restarted container keeps its own, and goes on."""
        self.fence = Fence(clock)
        self._api = api
        self._path = LEASE.path(namespace, names.LEASE)
        self._namespace = namespace
        self._identity = identity
        self._times = times
        self._clock = clock
        self._seen: JsonObject | None = None
        self._seen_at = -inf

    async def acquire(self) -> None:
        """Return when this candidate holds the Lease."""
        while not await self._attempt():
            await asyncio.sleep(self._patience())
        log.info("leading", identity=self._identity)

    async def hold(self) -> None:
        """Renew the Lease; return when it could not be done in time, or somebody else has it."""
        pause = self._times.retry
        while self.fence.is_open:
            await asyncio.sleep(max(PAUSE_SECONDS_MIN, min(pause, self.fence.remaining_seconds)))
            renewed = self.fence.is_open and await self._attempt()
            if not renewed and not self._is_mine(self._seen):
                break
            pause = self._times.retry if renewed else self._times.retry * HURRY
        self.fence.close()
        log.warning("lost the lease", identity=self._identity)

    async def release(self) -> None:
        """Let the next one start at once. Call it when nothing is written any more."""
        was_open = self.fence.is_open
        self.fence.close()
        if not was_open:
            return
        try:
            async with asyncio.timeout(self._times.retry):
                await self._replaced("", RELEASED_SECONDS)
        except (ApiError, TimeoutError) as error:
            log.info("lease not released: it ends by itself", error=str(error))

    def _patience(self) -> float:
        """Seconds until the next look: not later than the moment at which the Lease has run out."""
        left = self._free_at() - self._clock()
        return max(PAUSE_SECONDS_MIN, min(self._times.retry, left)) if left > 0 else self._times.retry

    async def _attempt(self) -> bool:
        """Whether the Lease is ours, freshly renewed."""
        limit = self._times.retry * ATTEMPT
        if self.fence.is_open:  # whoever leads must know when to stop
            limit = min(limit, self.fence.remaining_seconds)
        try:
            async with asyncio.timeout(limit):
                return await self._take()
        except (ApiError, TimeoutError) as error:
            log.info("lease not renewed", error=str(error) or "no answer in time")
            return False

    async def _take(self) -> bool:
        # The holder writes at once: its picture is its own last write, and an older one is refused.
        if not self._is_mine(self._seen):
            await self._read()
        return await self._replaced(self._identity, self._times.duration)

    async def _replaced(self, holder: str, duration_seconds: int) -> bool:
        """Write the Lease if it may be taken, twice if the first picture of it was old."""
        for _ in range(2):
            sent = self._clock()
            if sent < self._free_at():
                return False
            try:
                await self._write(holder, duration_seconds)
            except (Conflict, Invalid, Missing):
                await self._read()
                continue
            if holder:
                self.fence.open_until(sent + self._times.renew)
            return True
        return False

    def _free_at(self) -> float:
        """When the Lease may be taken, on our clock."""
        spec = self._seen["spec"] if self._seen is not None else {}
        if spec.get("holderIdentity", "") in {"", self._identity}:
            return -inf
        return self._seen_at + float(spec.get("leaseDurationSeconds", self._times.duration))

    def _is_mine(self, lease: JsonObject | None) -> bool:
        return lease is not None and lease["spec"].get("holderIdentity") == self._identity

    async def _read(self) -> None:
        try:
            found = await self._api.request("GET", self._path)
        except Missing:
            self._seen = None
            return
        self._note(found)

    def _note(self, found: JsonObject) -> None:
        version = found["metadata"]["resourceVersion"]
        if self._seen is None or self._seen["metadata"]["resourceVersion"] != version:
            self._seen, self._seen_at = {"spec": {}, **found}, self._clock()

    async def _write(self, holder: str, duration_seconds: int) -> None:
        """Put the Lease over what was seen last.

        Raises:
            Conflict: that is not what is there.
            Invalid: nothing had been seen, but somebody else has made it meanwhile.
            Missing: it was deleted.
        """
        before = self._seen if self._seen is not None else {"metadata": {}, "spec": {}}
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        old = before["spec"]
        changes = old.get("holderIdentity", "") != holder
        spec = {
            "holderIdentity": holder,
            "leaseDurationSeconds": duration_seconds,
            "acquireTime": now if changes else old.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (changes and holder != ""),
        }
        # With a PUT even the first write is one to a named object, which a role can be limited to.
        about = {"name": names.LEASE, "namespace": self._namespace}
        body = {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {**about, **before["metadata"]},
            "spec": spec,
        }
        self._note(await self._api.request("PUT", self._path, body=body))
