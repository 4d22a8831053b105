"""The API server as far as one Lease is concerned, behind a network that delays and loses messages.

It passes the suite of the real one (cluster/test_lease_election.py).
"""

from __future__ import annotations

import asyncio
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tributary_operator.api import Conflict, Invalid, JsonObject, Missing, Unreachable


@dataclass
class LeaseServer:
    lease: JsonObject | None = None
    version: int = 0
    requests: list[str] = field(default_factory=list)

    def answer(self, verb: str, body: JsonObject | None) -> JsonObject:
        self.requests.append(verb)
        if verb == "PUT":
            assert body is not None
            self._put(body)
        if self.lease is None:
            raise Missing("not found")
        return deepcopy(self.lease)

    def _put(self, body: JsonObject) -> None:
        given = body["metadata"].get("resourceVersion")
        if self.lease is not None and given is None:
            raise Invalid("metadata.resourceVersion: must be specified for an update")
        if self.lease is not None and given != str(self.version):
            raise Conflict("the object has been modified")
        self.version += 1
        metadata = {**body["metadata"], "resourceVersion": str(self.version)}
        self.lease = deepcopy({**body, "metadata": metadata})


@dataclass
class Road:
    """What lies between one candidate and the server."""

    server: LeaseServer
    random: Random = field(default_factory=lambda: Random(0))
    is_cut: bool = False
    loses: float = 0.0
    """Share of requests, and of answers, that never arrive."""
    delay_seconds_max: float = 0.0
    _sent: set[asyncio.Task[Any]] = field(default_factory=set)

    async def request(self, verb: str, path: str, *, query: Any = None, body: Any = None) -> JsonObject:
        # A request that its sender has given up may still arrive.
        task = asyncio.create_task(self._carry(verb, body))
        self._sent.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._sent.discard(task)
        if not task.cancelled():
            task.exception()

    async def _carry(self, verb: str, body: Any) -> JsonObject:
        await self._way()
        try:
            return self.server.answer(verb, body)
        finally:
            await self._way()

    async def _way(self) -> None:
        await asyncio.sleep(self.random.uniform(0, self.delay_seconds_max))
        if self.is_cut or self.random.random() < self.loses:
            raise Unreachable("lost on the way")
