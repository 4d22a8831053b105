"""The operator as a whole: reads the settings, connects, and runs until it is asked to go."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
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


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Reconcile until `stop` is set."""
    daemons = Daemons()
    api = await Api.connect(settings.request_timeout_seconds)
    world = connect(settings, api, daemons)
    daemons.start(world, reconcilers(world, daemons))
    probes = await health.serve(daemons, settings.health_port, settings.stuck_after_seconds)
    try:
        await wait_for_kinds(api)
        log.info("operator started", worker_image=settings.worker_image, bucket=settings.bucket)
        await kopf.operator(
            registry=registry(daemons, settings.watch_timeout_seconds),
            clusterwide=True,
            standalone=True,
            stop_flag=stop,
        )
    finally:
        await daemons.close()
        await world.jobs.close()
        await probes.cleanup()
        world.accounting.close()
        world.records.close()
        await api.close()


async def _run_until_signal(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run(settings, stop)


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsInvalid as error:
        sys.exit(str(error))
    logs.configure(settings.log_level)
    asyncio.run(_run_until_signal(settings))
