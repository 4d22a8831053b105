"""/healthz, /readyz and /metrics."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tributary_operator.daemons import Daemons
from tributary_operator.leases import Fence


def application(daemons: Daemons, fence: Fence, stuck_after_seconds: int) -> web.Application:
    async def healthz(_: web.Request) -> web.Response:
        """Fails when a pass hangs; an operator without objects is healthy, too."""
        stuck = daemons.longest_pass_seconds > stuck_after_seconds
        figures = {
            "lastPassAgeSeconds": round(daemons.last_pass_age_seconds, 1),
            "longestPassSeconds": round(daemons.longest_pass_seconds, 1),
        }
        return web.json_response(figures, status=503 if stuck else 200)

    async def readyz(_: web.Request) -> web.Response:
        """A standby is as ready as the leader: both have to be there for a roll-out to go on."""
        return web.json_response({"ready": True, "leads": fence.is_open})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    return app


async def serve(daemons: Daemons, fence: Fence, port: int, stuck_after_seconds: int) -> web.AppRunner:
    runner = web.AppRunner(application(daemons, fence, stuck_after_seconds), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
