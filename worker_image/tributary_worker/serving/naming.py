"""Around the whole application: every response names the release that gave it, and is counted."""

from __future__ import annotations

import time
from collections.abc import Collection
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tributary_worker.serving.service import Service

RELEASE_HEADER = "x-tributary-release"
OTHER_ROUTE = "other"
"""Label of all unknown paths: anybody can make up any number of them."""


class NamedResponses:
    """ASGI middleware. Outermost, so that errors made by the framework are named too."""

    def __init__(self, app: ASGIApp, service: Service, routes: Collection[str]) -> None:
        self._app = app
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), HTTPStatus.INTERNAL_SERVER_ERROR.value

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._headers()]
            await send(message)

        try:
            await self._app(scope, receive, named_send)
        finally:
            route = scope["path"] if scope["path"] in self._routes else OTHER_ROUTE
            self._service.metrics.request(route, status, time.monotonic() - began)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(RELEASE_HEADER.encode(), self._service.identity.encode())]
        if self._service.is_draining:
            # A client that kept its connection would find the door closed at its next request.
            headers.append((b"connection", b"close"))
        return headers
