"""The routes of the server: the completions API, its errors in OpenAI's shape, probes and metrics."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from tributary_worker.serving.generation import GenerationError, Piece
from tributary_worker.serving.metrics import CONTENT_TYPE
from tributary_worker.serving.naming import NamedResponses
from tributary_worker.serving.protocol import (
    ApiError,
    Completion,
    error_body,
    model_list,
    parse_request,
    server_sent_event,
)
from tributary_worker.serving.service import Service

BODY_BYTES_MAX = 2**20
"""Far more than the longest prompt that a model here can read."""
RETRY_AFTER_SECONDS = 1
STREAM_END = "[DONE]"

log = structlog.get_logger()


def build_app(service: Service) -> ASGIApp:
    """The server's application. It answers from the first moment, and completes once a model is open."""
    api = _Api(service)
    routes = [
        Route("/v1/models", api.models),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/healthz", api.healthz),
        Route("/readyz", api.readyz),
        Route("/metrics", api.metrics),
    ]
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _unforeseen}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return NamedResponses(app, service, {route.path for route in routes})


class _Api:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, _request: Request) -> Response:
        return JSONResponse(model_list(self._service.release, self._service.created))

    async def healthz(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, _request: Request) -> Response:
        if self._service.is_ready:
            return PlainTextResponse("ready\n")
        reason = "draining" if self._service.is_draining else "loading"
        return PlainTextResponse(f"{reason}\n", HTTPStatus.SERVICE_UNAVAILABLE)

    async def metrics(self, _request: Request) -> Response:
        return Response(self._service.metrics.page(), headers={"content-type": CONTENT_TYPE})

    async def completions(self, request: Request) -> Response:
        asked = parse_request(await _body(request))
        prompt_tokens, pieces = self._service.start(asked)
        completion = Completion(f"cmpl-{uuid.uuid4().hex}", int(time.time()), self._service.release)
        if asked.stream:
            events = self._events(completion, prompt_tokens, pieces)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        try:
            return JSONResponse(await self._whole(completion, prompt_tokens, pieces))
        except Exception as error:
            # Not left to the framework: it would close the connection, and break the client's next request.
            return JSONResponse(_internal(error), HTTPStatus.INTERNAL_SERVER_ERROR)

    async def _whole(
        self, completion: Completion, prompt_tokens: int, pieces: AsyncGenerator[Piece, None]
    ) -> dict[str, Any]:
        taken = [piece async for piece in pieces]
        if not taken:
            raise GenerationError("the generation ended before it began")
        finish, tokens = taken[-1].finish, taken[-1].tokens
        self._service.metrics.tokens(prompt_tokens, tokens)
        return completion.response("".join(piece.text for piece in taken), finish, prompt_tokens, tokens)

    async def _events(
        self, completion: Completion, prompt_tokens: int, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[bytes, None]:
        tokens = 0
        try:
            async for piece in pieces:
                tokens = piece.tokens
                if piece.text or piece.finish:
                    yield server_sent_event(json.dumps(completion.chunk(piece.text, piece.finish)))
            yield server_sent_event(STREAM_END)
        except Exception as error:
            # The status is out already, so the stream itself must say that it broke.
            yield server_sent_event(json.dumps(_internal(error)))
        finally:
            await pieces.aclose()
            self._service.metrics.tokens(prompt_tokens, tokens)


async def _body(request: Request) -> bytes:
    """The request's body. Raises ApiError as soon as it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            message = f"the body is longer than {BODY_BYTES_MAX} bytes"
            raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
    return bytes(body)


async def _api_error(_request: Request, error: ApiError) -> Response:
    busy = error.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if busy else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(_request: Request, error: HTTPException) -> Response:
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)


async def _unforeseen(_request: Request, error: Exception) -> Response:
    return JSONResponse(_internal(error), HTTPStatus.INTERNAL_SERVER_ERROR)


def _internal(error: Exception) -> dict[str, Any]:
    log.error("generation failed", error=repr(error))
    # An unforeseen error's words may quote the prompt of somebody else.
    words = str(error) if isinstance(error, GenerationError) else "internal error"
    return error_body(HTTPStatus.INTERNAL_SERVER_ERROR, words)
