"""An HTTP proxy that writes down every request: what somebody on the network, or the store's owner, sees."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CONTENT_LENGTH = "Content-Length"
NOT_FORWARDED = {"connection", "transfer-encoding", "expect", "keep-alive"}


@dataclass(frozen=True)
class Request:
    """One request and the length of its body, with the answer's status."""

    method: str
    path: str
    body_bytes: int
    status: int


@contextmanager
def recording_proxy(endpoint: str, log: list[Request]) -> Iterator[str]:
    """The endpoint of a proxy before `endpoint`, an http address; requests are added to `log` in order."""
    where = urlsplit(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get(CONTENT_LENGTH, 0)))
            upstream = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
            # The signature covers the host that the client named: the headers go on as they came.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in NOT_FORWARDED:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            log.append(Request(self.command, self.path, len(body), answer.status))
            self._answer(answer, answer.read())
            upstream.close()

        def _answer(self, answer: http.client.HTTPResponse, data: bytes) -> None:
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in NOT_FORWARDED | {CONTENT_LENGTH.lower()}:
                    self.send_header(name, value)
            length = answer.getheader(CONTENT_LENGTH) if self.command == "HEAD" else str(len(data))
            self.send_header(CONTENT_LENGTH, length or "0")
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
