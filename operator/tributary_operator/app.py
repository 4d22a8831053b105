"""The operator as a whole: reads the settings, connects, and runs until it is asked to go."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import kopf
import structlog

from tributary_api.base import API_VERSION
from tributary_operator import health, logs
from tributary_operator.accounting import Accounting
from tributary_operator.api import Api, ApiError
from tributary_operator.cluster import Cluster
from tributary_operator.daemons import Daemons
from tributary_operator.handlers import registry
from tributary_operator.jobs import JobWatches
from tributary_operator.kinds import OURS
from tributary_operator.leases import Election
from tributary_operator.reconciler import World
from tributary_operator.reconcilers import reconcilers
from tributary_operator.settings import Settings, SettingsInvalid
from tributary_operator.store import Records
from tributary_store.objectstore import ObjectStore

KINDS_RETRY_SECONDS = 2

log = structlog.get_logger()


def connect(settings: Settings, api: Api, daemons: Daemons) -> World:
    cluster = Cluster(api)
    store = ObjectStore.open(settings.store)
    records = Records(store, settings.store_threads)

    def clock() -> datetime:
        return datetime.now(UTC)

    return World(
        settings=settings,
        cluster=cluster,
        jobs=JobWatches(cluster, settings.watch_timeout_seconds, daemons.wake, clock),
        records=records,
        accounting=Accounting(settings.store, store, records, settings.accountant_processes),
        clock=clock,
        wake=daemons.wake,
        cached=daemons.cached,
    )


async def wait_for_kinds(api: Api) -> None:
    """Kopf looks for its kinds once; so they must be served before it starts."""
    while True:
        try:
            served = await api.request("GET", f"/apis/{API_VERSION}")
            missing = {kind.plural for kind in OURS} - {r["name"] for r in served["resources"]}
        except ApiError as error:
            missing = {str(error)}
        if not missing:
            return
        log.warning("waiting for the CRDs: install the chart tributary", missing=sorted(missing))
        await asyncio.sleep(KINDS_RETRY_SECONDS)


@dataclass(slots=True)
class Operator:
    """One replica, from its start to its end."""

    settings: Settings
    daemons: Daemons = field(default_factory=Daemons)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Stand for election, and reconcile whenever it is won, until a signal says stop."""
        self._heed_signals()
        settings = self.settings
        api = await Api.connect(settings.request_timeout_seconds)
        election = Election(api, settings.namespace, settings.identity, settings.lease_times)
        probes = await health.serve(
            self.daemons, election.fence, settings.health_port, settings.stuck_after_seconds
        )
        try:
            await _first(wait_for_kinds(api), self.stop.wait())
            while not self.stop.is_set():
                await _first(election.acquire(), self.stop.wait())
                if not self.stop.is_set():
                    await self._lead(api.fenced(election.fence.check), election)
        finally:
            await election.release()
            await probes.cleanup()
            await api.close()

    async def _lead(self, api: Api, election: Election) -> None:
        """One term, until the Lease is lost or a signal says stop. Ends with nothing left that writes."""
        world = connect(self.settings, api, self.daemons)
        self.daemons.start(world, reconcilers(world, self.daemons))
        settings = self.settings
        key = settings.signing_key.public  # what an owner may trust alone
        log.info("operator started", worker_image=settings.worker_image, bucket=settings.bucket, hub_key=key)
        over = asyncio.Event()
        watching = asyncio.create_task(self._watch(over), name="kopf")
        try:
            await _first(election.hold(), self.stop.wait(), asyncio.shield(watching))
        finally:
            # First of all, while the Lease cannot have been taken yet; then the next one may start at once.
            await self.daemons.close()
            await election.release()
            await world.jobs.close()
            world.accounting.close()
            world.records.close()
            over.set()
            await watching

    async def _watch(self, over: asyncio.Event) -> None:
        """Kopf, until `over` is set. If it ends by itself, a signal has reached it instead of us."""
        table = registry(self.daemons, self.settings.watch_timeout_seconds, self._heed_signals)
        await kopf.operator(registry=table, clusterwide=True, standalone=True, stop_flag=over)
        if not over.is_set():
            self.stop.set()

    def _heed_signals(self) -> None:
        """Again at each start of Kopf, which takes the signals over."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)


async def _first(*awaited: Awaitable[object]) -> None:
    """Wait for the first of them, and cancel the others. Raises what the first has raised."""
    tasks = [asyncio.ensure_future(each) for each in awaited]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsInvalid as error:
        sys.exit(str(error))
    logs.configure(settings.log_level)
    asyncio.run(Operator(settings).run())
