"""Who leads: never two at once, always somebody in the end, and at once after a release."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lease_server import LeaseServer, Road
from virtual_time import run_in_virtual_time

from tributary_operator.api import Deposed
from tributary_operator.leases import Election, LeaseTimes
from tributary_operator.settings import Settings

TIMES = LeaseTimes(duration=12, renew=8, retry=3)
FAIL_OVER_SECONDS_MAX = TIMES.duration + TIMES.retry
STOP_SECONDS = 3.9
"""How long a deposed leader goes on in these worlds: its daemons take that long to stop."""
LOOK_SECONDS = 0.05


class Replica:
    """An operator without reconcilers: leads, and goes on for a while after it was deposed."""

    def __init__(self, server: LeaseServer, name: str, random: Random) -> None:
        self.road = Road(server, random)
        self.name = name
        self.works = False
        self.start()

    def start(self) -> None:
        clock = asyncio.get_running_loop().time
        self.election = Election(self.road, "system", self.name, TIMES, clock)
        self.task = asyncio.create_task(self._live())

    async def _live(self) -> None:
        while True:
            await self.election.acquire()
            self.works = True
            await self.election.hold()
            await asyncio.sleep(STOP_SECONDS)
            self.works = False

    async def kill(self) -> None:
        """Like SIGKILL: nothing is released."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.works = False

    async def stop(self) -> None:
        await self.kill()
        await self.election.release()


def working(replicas: list[Replica]) -> list[str]:
    return [replica.name for replica in replicas if replica.works]


async def seconds_until(check: Callable[[], bool]) -> float:
    clock = asyncio.get_running_loop().time
    start = clock()
    while not check():
        await asyncio.sleep(LOOK_SECONDS)
        assert clock() - start < 1000, "it never happens"
    return clock() - start


async def two_replicas() -> list[Replica]:
    server = LeaseServer()
    replicas = [Replica(server, name, Random(0)) for name in "ab"]
    await seconds_until(lambda: bool(working(replicas)))
    leader = next(r for r in replicas if r.works)
    return sorted(replicas, key=lambda r: r is not leader)


def test_one_of_two_leads_and_keeps_the_lease() -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        for _ in range(1000):
            await asyncio.sleep(0.1)
            assert (leader.works, other.works) == (True, False)
        lease = leader.road.server.lease
        assert lease is not None
        assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == (leader.name, 1)
        # 100 seconds of one renewal and one look in each retry period, of which a look takes none.
        assert len(leader.road.server.requests) <= 2 * (100 / TIMES.retry + 4)

    run_in_virtual_time(story())


def test_whoever_goes_hands_over_at_once() -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        await asyncio.sleep(1)
        await leader.stop()
        assert await seconds_until(lambda: other.works) <= TIMES.retry

    run_in_virtual_time(story())


@given(st.floats(0, 20))
def test_after_a_kill_another_takes_over_when_the_lease_has_run_out(after_seconds: float) -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        await asyncio.sleep(after_seconds)
        await leader.kill()
        taken = await seconds_until(lambda: other.works)
        assert TIMES.duration - TIMES.retry <= taken <= FAIL_OVER_SECONDS_MAX + LOOK_SECONDS

    run_in_virtual_time(story())


def test_a_restarted_container_goes_on_as_the_same_holder() -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        await leader.kill()
        leader.start()
        assert await seconds_until(lambda: leader.works) <= LOOK_SECONDS
        assert not other.works

    run_in_virtual_time(story())


def test_a_leader_that_is_cut_off_stops_before_anybody_takes_over() -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        leader.road.is_cut = True
        await seconds_until(lambda: not leader.election.fence.is_open)
        with pytest.raises(Deposed):
            leader.election.fence.check()
        await seconds_until(lambda: not leader.works)
        assert not other.works
        await seconds_until(lambda: other.works)
        leader.road.is_cut = False
        await asyncio.sleep(60)
        assert (leader.works, other.works) == (False, True)

    run_in_virtual_time(story())


def test_a_leader_that_is_frozen_writes_nothing_when_it_wakes() -> None:
    """SIGSTOP, a paused machine: its tasks have noticed nothing yet, but the clock has."""

    async def story() -> None:
        leader, _ = await two_replicas()
        leader.task.cancel()
        leader.election.fence.check()
        await asyncio.sleep(TIMES.renew)
        with pytest.raises(Deposed):
            leader.election.fence.check()

    run_in_virtual_time(story())


def test_a_short_outage_deposes_nobody() -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        leader.road.is_cut = other.road.is_cut = True
        await asyncio.sleep(TIMES.renew - TIMES.retry - 1)
        leader.road.is_cut = other.road.is_cut = False
        await asyncio.sleep(60)
        assert (leader.works, other.works) == (True, False)

    run_in_virtual_time(story())


def test_a_lease_that_somebody_deletes_is_made_again() -> None:
    async def story() -> None:
        leader, other = await two_replicas()
        leader.road.server.lease = None
        await asyncio.sleep(60)
        assert len(working([leader, other])) == 1
        assert leader.road.server.lease is not None

    run_in_virtual_time(story())


@settings(max_examples=60)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.05, 0.3, 0.6]),
    st.sampled_from([0.01, 0.5, 3.0, 12.0]),
)
def test_never_two_and_in_the_end_one(seed: int, loses: float, delay_seconds_max: float) -> None:
    """Messages get lost or arrive late, even after their sender gave up; replicas die and return."""

    async def story() -> None:
        random, server = Random(seed), LeaseServer()
        replicas = [Replica(server, name, random) for name in "abc"]
        for replica in replicas:
            replica.road.loses, replica.road.delay_seconds_max = loses, delay_seconds_max
        for step in range(3000):
            await asyncio.sleep(LOOK_SECONDS)
            assert len(working(replicas)) <= 1, f"after {step * LOOK_SECONDS} s: {working(replicas)}"
            if random.random() < 0.005:
                await _strike(random.choice(replicas), random)
        for replica in replicas:
            replica.road.loses = replica.road.delay_seconds_max = 0.0
            replica.road.is_cut = False
            if replica.task.done():
                replica.start()
        await asyncio.sleep(2 * FAIL_OVER_SECONDS_MAX)
        assert len(working(replicas)) == 1

    run_in_virtual_time(story())


async def _strike(replica: Replica, random: Random) -> None:
    if random.random() < 0.6:
        replica.road.is_cut = not replica.road.is_cut
    elif replica.task.done():
        replica.start()
    elif random.random() < 0.5:
        await replica.kill()
    else:
        await replica.stop()


def test_the_settings_keep_a_fail_over_below_twenty_seconds() -> None:
    defaults = {
        name: field.default for name, field in Settings.model_fields.items() if name.startswith("lease_")
    }
    assert defaults["lease_duration_seconds"] + defaults["lease_retry_seconds"] <= 16
