"""A proxy in front of the API server or S3 that numbers the operator's writes and strikes at one of them."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

import aiohttp
from aiohttp import web
from yarl import URL

READS = {"GET", "HEAD", "OPTIONS"}
UNNUMBERED = re.compile("/leases/")
"""Renewals go by the clock: numbering them would give every run other numbers."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
STALL_SECONDS = 3.0


class Fault(Enum):
    """What happens at the write with the number that was chosen, or to every watch."""

    KILL_BEFORE = "the operator is killed before the write is forwarded"
    KILL_AFTER = "the operator is killed when the write is done, before it hears of it"
    LOSE_ANSWER = "the write is done, but its answer is lost"
    LOSE_REQUEST = "the write is lost"
    STALL = "the write is forwarded late"
    CONFLICT = "409"
    TOO_MANY = "429"
    BROKEN = "500"
    WATCH_ENDS = "every watch ends after each event"
    WATCH_EXPIRES = "the second watch of each path, and every fifth after it, is answered 410"
    EVENTS_TWICE = "every event comes twice"
    EVENTS_LATE = "every event comes late"


KILLS = (Fault.KILL_BEFORE, Fault.KILL_AFTER)
AT_A_WRITE = (*KILLS, Fault.LOSE_ANSWER, Fault.LOSE_REQUEST, Fault.STALL, Fault.TOO_MANY, Fault.BROKEN)
OF_WATCHES = (Fault.WATCH_ENDS, Fault.WATCH_EXPIRES, Fault.EVENTS_TWICE, Fault.EVENTS_LATE)
STATUS_OF = {Fault.CONFLICT: 409, Fault.TOO_MANY: 429, Fault.BROKEN: 500}


@dataclass(slots=True)
class Write:
    number: int
    server: str
    verb: str
    path: str
    status: int = 0
    """Of the answer; 0 when there was none, or not yet."""

    @property
    def is_done(self) -> bool:
        return 200 <= self.status < 300


@dataclass
class Script:
    """One plan: the fault, where it strikes, and the journal of all writes, of both proxies."""

    fault: Fault | None = None
    at: int = 0
    strike: Callable[[], None] = lambda: None
    """Kills the operator."""
    writes: list[Write] = field(default_factory=list)
    struck: bool = False
    _watches: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, fault: Fault | None, at: int, strike: Callable[[], None]) -> None:
        with self._lock:
            self.fault, self.at, self.strike = fault, at, strike
            self.writes, self.struck, self._watches = [], False, {}

    def note(self, server: str, verb: str, path: str) -> tuple[Write, Fault | None]:
        """The write with its number, and the fault if it is the one."""
        with self._lock:
            write = Write(len(self.writes) + 1, server, verb, path)
            self.writes.append(write)
            is_due = write.number == self.at and self.fault in {*AT_A_WRITE, Fault.CONFLICT}
            self.struck |= is_due
            return write, self.fault if is_due else None

    def expires(self, path: str) -> bool:
        with self._lock:
            count = self._watches[path] = self._watches.get(path, 0) + 1
            due = self.fault is Fault.WATCH_EXPIRES and count % 5 == 2
            self.struck |= due
            return due


class FaultyProxy:
    """Listens on this machine, plain HTTP, and forwards to `upstream` what the script lets through."""

    def __init__(self, name: str, upstream: str, script: Script, trust: ssl.SSLContext | None = None) -> None:
        self._name, self._upstream, self._script, self._trust = name, upstream, script, trust
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.endpoint = ""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._trust if self._trust is not None else True)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=timeout)
        runner = web.ServerRunner(web.Server(self._handle))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if "Expect" in request.headers and request.writer is not None:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.method not in READS and not UNNUMBERED.search(request.path):
            return await self._write(request)
        if request.query.get("watch") in {"true", "1"}:
            return await self._watch(request)
        return await self._forward(request)

    async def _write(self, request: web.BaseRequest) -> web.StreamResponse:
        write, fault = self._script.note(self._name, request.method, request.path)
        if fault is Fault.KILL_BEFORE:
            self._script.strike()
        if fault in {Fault.KILL_BEFORE, Fault.LOSE_REQUEST}:
            return _dropped(request)
        if fault in STATUS_OF:
            return _refused(STATUS_OF[fault])
        if fault is Fault.STALL:
            await asyncio.sleep(STALL_SECONDS)
        answer = await self._forward(request)
        write.status = answer.status
        if fault is Fault.KILL_AFTER:
            self._script.strike()
        return _dropped(request) if fault in {Fault.KILL_AFTER, Fault.LOSE_ANSWER} else answer

    def _request(self, request: web.BaseRequest, body: bytes | None) -> aiohttp.client._RequestContextManager:
        # Host stays, and the path as it was written: S3 signs both.
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP]
        url = URL(self._upstream + request.raw_path, encoded=True)
        return self._session.request(
            request.method, url, headers=headers, data=body, skip_auto_headers=["Content-Type", "User-Agent"]
        )

    async def _forward(self, request: web.BaseRequest) -> web.Response:
        async with self._request(request, await request.read()) as upstream:
            body = await upstream.read()
            headers = _kept(upstream.headers)
            if request.method == "HEAD" and "Content-Length" in upstream.headers:
                headers.append(("Content-Length", upstream.headers["Content-Length"]))
            return web.Response(status=upstream.status, headers=headers, body=body)  # type: ignore[arg-type]

    async def _watch(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._request(request, None) as upstream:
            expires = self._script.expires(request.path)
            answer = web.StreamResponse(status=upstream.status, headers=_kept(upstream.headers))  # type: ignore[arg-type]
            await answer.prepare(request)
            lines = _once(EXPIRED) if expires else self._events(upstream)
            with suppress(ConnectionError, aiohttp.ClientConnectionError):  # the operator is gone
                async for line in lines:
                    await answer.write(line)
            return answer

    async def _events(self, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        script = self._script
        async for line in upstream.content:
            if script.fault is Fault.EVENTS_LATE:
                await asyncio.sleep(STALL_SECONDS)
            yield line
            if script.fault is Fault.EVENTS_TWICE:
                yield line
            script.struck |= script.fault in OF_WATCHES
            if script.fault is Fault.WATCH_ENDS:
                return


EXPIRED = (
    json.dumps(
        {
            "type": "ERROR",
            "object": {
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "code": 410,
                "reason": "Expired",
            },
        }
    ).encode()
    + b"\n"
)


async def _once(line: bytes) -> AsyncIterator[bytes]:
    yield line


def _kept(headers: object) -> list[tuple[str, str]]:
    return [(k, v) for k, v in headers.items() if k.lower() not in HOP_BY_HOP]  # type: ignore[attr-defined]


def _dropped(request: web.BaseRequest) -> web.Response:
    """No answer: the connection is gone."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=502)


def _refused(status: int) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": status,
        "message": "by the harness",
    }
    return web.json_response(body, status=status)
