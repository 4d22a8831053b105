"""The server process: loads the model while it answers probes already, and leaves without dropping a request.

When the pod is to go (SIGTERM), its address is still in use for a moment: endpoints leave a Service only when
every node has heard of it. So readiness turns false at once, requests are accepted for a grace period, then
the port closes and open responses are finished.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tributary_worker.compression.loading import LoadedModel
from tributary_worker.serving.app import build_app
from tributary_worker.serving.naming import RELEASE_HEADER
from tributary_worker.serving.service import Service, warm_up

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection, so that they close it and never send into a closing one."""


class DrainingServer(uvicorn.Server):
    """Serves one model. `load` runs in a thread; what it raises ends the server and is kept in `failure`.

    After `drain`, requests are accepted for `grace_seconds`; then the open ones have `finish_seconds` left.
    """

    def __init__(
        self,
        service: Service,
        load: Callable[[], LoadedModel],
        *,
        host: str,
        port: int,
        grace_seconds: float,
        finish_seconds: float,
    ) -> None:
        super().__init__(_config(service, host, port, finish_seconds))
        self.failure: Exception | None = None
        self._service = service
        self._load = load
        self._grace_seconds = grace_seconds
        self._closes_at: float | None = None
        self._loading: asyncio.Task[None] | None = None

    def drain(self) -> None:
        """Begin to leave; called from a signal handler or another thread."""
        self._service.is_draining = True
        if self._closes_at is None:
            self._closes_at = time.monotonic() + self._grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        # Not uvicorn's own: it would close the port at once, and end the process by the signal.
        self.drain()

    async def main_loop(self) -> None:
        self._loading = asyncio.create_task(self._open_model())
        await super().main_loop()

    async def on_tick(self, counter: int) -> bool:
        if self._closes_at is not None and time.monotonic() >= self._closes_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._service.close()

    async def _open_model(self) -> None:
        try:
            self._service.open(await asyncio.to_thread(self._warm_model))
        except Exception as error:  # whatever it is, a server without a model must not stay
            self.failure = error
            self.should_exit = True

    def _warm_model(self) -> LoadedModel:
        loaded = self._load()
        warm_up(loaded)
        return loaded


def _config(service: Service, host: str, port: int, finish_seconds: float) -> uvicorn.Config:
    class Protocol(H11Protocol):
        """Names the release even to those who do not speak HTTP."""

        def send_400_response(self, msg: str) -> None:
            body = f"{msg}\n".encode()
            head = (
                f"HTTP/1.1 400 Bad Request\r\n{RELEASE_HEADER}: {service.identity}\r\n"
                f"content-type: text/plain\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return uvicorn.Config(
        build_app(service),
        host=host,
        port=port,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(finish_seconds)),
    )
