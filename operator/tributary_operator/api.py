"""HTTP to the API server: plain JSON objects in and out, errors told apart by what to do about them."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from tributary_operator import metrics

JsonObject = dict[str, Any]
Query = Mapping[str, str | int]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"

CONNECTIONS_MAX = 200
"""Watches hold one each; the rest are short requests."""
WATCH_SILENCE_SECONDS = 60
"""Added to the server's time-out of a watch: after that long without an end the connection is dead."""


class ApiError(Exception):
    """The API server refused; the text is what it said."""


class Missing(ApiError):
    """There is no such object."""


class Conflict(ApiError):
    """It exists already, or it has changed since it was read."""


class Expired(ApiError):
    """The resourceVersion is too old to watch from: list again."""


class Forbidden(ApiError):
    """RBAC or an admission policy says no."""


class Invalid(ApiError):
    """The object is refused as it is; sending it again does not help."""


class Unreachable(ApiError):
    """No answer, too many requests or a server error: try again later."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    # 401 is left out: a token that has just expired is read afresh, so it is a matter of waiting.
    403: Forbidden,
    404: Missing,
    409: Conflict,
    410: Expired,
    422: Invalid,
}


def error_of(status: int, body: str) -> ApiError:
    try:
        message = str(json.loads(body).get("message", body))
    except (ValueError, AttributeError):
        message = body
    return _BY_STATUS.get(status, Unreachable)(message[:1000] or f"HTTP status {status}")


class Deposed(ApiError):
    """Another operator leads, or may: nothing is written any more."""


class Api:
    """One connection pool to one API server."""

    def __init__(
        self,
        api_client: client.ApiClient,
        request_timeout_seconds: int,
        may_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = api_client
        self._timeout_seconds = request_timeout_seconds
        self._may_write = may_write

    def fenced(self, may_write: Callable[[], None]) -> Api:
        """The same connections; `may_write` is called before each writing request, and raises Deposed."""
        return Api(self._client, self._timeout_seconds, may_write)

    @classmethod
    async def connect(cls, request_timeout_seconds: int) -> Api:
        """With the pod's service account, or the KUBECONFIG of a person who runs the operator by hand."""
        configuration = client.Configuration()
        if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            path = os.environ.get("KUBECONFIG", str(Path.home() / ".kube" / "config"))
            await config.load_kube_config(config_file=path, client_configuration=configuration)  # type: ignore[no-untyped-call]
        configuration.connection_pool_maxsize = CONNECTIONS_MAX
        return cls(client.ApiClient(configuration), request_timeout_seconds)

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]

    def plain(self, model: Any) -> JsonObject:
        """A typed manifest as the JSON that is sent: absent instead of null."""
        body: JsonObject = _without_nulls(self._client.sanitize_for_serialization(model))  # type: ignore[no-untyped-call]
        return body

    async def request(
        self, verb: str, path: str, *, query: Query | None = None, body: Any = None, content_type: str = JSON
    ) -> JsonObject:
        """The answer's object.

        Raises:
            ApiError: one of its kinds above; Deposed: nothing was sent.
        """
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds)
        response = await self._send(verb, path, query or {}, body, content_type=content_type, timeout=timeout)
        try:
            text = (await response.read()).decode()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"the answer broke off: {error}") from error
        if response.status >= 300:
            raise error_of(response.status, text)
        answer: JsonObject = json.loads(text)
        return answer

    async def watch(self, path: str, query: Query, timeout_seconds: int) -> AsyncIterator[JsonObject]:
        """Watch events, until the server ends the watch.

        Raises:
            ApiError: Expired when the list is to be made again.
        """
        full = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": timeout_seconds}
        silence = timeout_seconds + WATCH_SILENCE_SECONDS
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_seconds, sock_read=silence)
        response = (await self._send("GET", path, full, None, content_type=JSON, timeout=timeout)).response
        try:
            if response.status >= 300:
                raise error_of(response.status, await response.text())
            async for line in response.content:
                event: JsonObject = json.loads(line)
                if event["type"] == "ERROR":
                    raise error_of(int(event["object"].get("code", 500)), json.dumps(event["object"]))
                yield event
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreachable(f"the watch broke off: {error}") from error
        finally:
            response.close()

    async def _send(
        self,
        verb: str,
        path: str,
        query: Query,
        body: Any,
        *,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> Any:
        method, url, headers, sent, *_ = await self._client.param_serialize(
            method=verb,
            resource_path=path,
            query_params=list(query.items()),
            header_params={"Accept": JSON, "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        if verb != "GET":
            self._may_write()
        metrics.api_request(verb, path)
        try:
            return await self._client.call_api(method, url, headers, sent, _request_timeout=timeout)
        except ApiException as error:
            raise error_of(error.status or 0, error.body or str(error)) from error
        except (TimeoutError, aiohttp.ClientError, OSError, ssl.SSLError) as error:
            raise Unreachable(f"the API server does not answer: {error or type(error).__name__}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
