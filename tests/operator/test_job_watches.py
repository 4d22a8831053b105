"""What a watch of Jobs makes of errors: only a refusal says something about the namespace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest
from round_worlds import T0

from tributary_operator import jobs, names
from tributary_operator.api import ApiError, Forbidden, JsonObject, Unreachable, error_of
from tributary_operator.jobs import JobWatches

RAW = {
    "metadata": {
        "name": "j",
        "namespace": "a",
        "uid": "u",
        "labels": {names.STAGE: names.TRAIN},
        "annotations": {names.OWNER: "round"},
    }
}


class Server:
    """Lists one Job, or says what the next list and the next watch end with."""

    def __init__(self, *lists: ApiError | None, watches: tuple[ApiError, ...] = ()) -> None:
        self.lists, self.watches = list(lists), list(watches)
        self.listed = 0
        self.api = self

    async def find(self, *_: Any) -> tuple[list[JsonObject], str]:
        self.listed += 1
        error = self.lists.pop(0) if self.lists else None
        if error is not None:
            raise error
        return [RAW], "1"

    async def watch(self, *_: Any) -> AsyncIterator[JsonObject]:
        if self.watches:
            raise self.watches.pop(0)
        await asyncio.Event().wait()
        yield {}


class Watching:
    """The watches of a server, and whom they wake."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.woken: list[str] = []
        self.now = T0
        self.watches = JobWatches(server, 60, self.woken.append, self._clock)  # type: ignore[arg-type]

    def _clock(self) -> datetime:
        return self.now

    async def until_listed(self, times: int) -> None:
        async with asyncio.timeout(10):
            while self.server.listed < times:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RETRY_SECONDS_MAX", 0.3)


@pytest.mark.parametrize(
    "error", [Unreachable("busy"), error_of(429, ""), error_of(401, ""), error_of(500, "")]
)
async def test_what_says_nothing_about_the_namespace_is_waited_for(error: ApiError) -> None:
    found = Watching(Server(error, error))
    with pytest.raises(Unreachable):
        await found.watches.retain("round", ["a"])
    await found.until_listed(2)
    with pytest.raises(Unreachable):
        await found.watches.retain("round", ["a"])
    await found.until_listed(3)
    assert await found.watches.retain("round", ["a"]) == {}
    assert "round" in found.woken
    await found.watches.close()


async def test_a_list_that_takes_too_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SYNC_TIMEOUT_SECONDS", 0.01)
    server = Server()

    async def silent(*_: Any) -> Any:
        await asyncio.Event().wait()

    server.find = silent  # type: ignore[method-assign]
    found = Watching(server)
    with pytest.raises(Unreachable):
        await found.watches.retain("round", ["a"])
    await found.watches.close()


async def test_a_refusal_is_reported_since_its_first_time_and_ends_with_a_list() -> None:
    found = Watching(Server(Forbidden("no"), Forbidden("no")))
    denied = await found.watches.retain("round", ["a"])
    assert denied["a"].since == T0
    found.now = T0.replace(hour=5)
    await found.until_listed(2)
    assert (await found.watches.retain("round", ["a"]))["a"].since == T0
    await found.until_listed(3)
    assert await found.watches.retain("round", ["a"]) == {}
    await found.watches.close()


@pytest.mark.parametrize("error", [Unreachable("gone"), Forbidden("no")])
async def test_a_broken_watch_keeps_the_picture(error: ApiError) -> None:
    found = Watching(Server(None, error, watches=(error,)))
    await found.watches.retain("round", ["a"])
    await found.until_listed(2)
    denied = await found.watches.retain("round", ["a"])
    assert (denied.keys() == {"a"}) is isinstance(error, Forbidden)
    assert [job.name for job in found.watches.jobs(["a"], {})] == ["j"]
    await found.watches.close()
