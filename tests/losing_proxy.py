"""A TCP proxy that delivers requests but loses the first answers to a method: a network at its worst."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from urllib.parse import urlsplit


@contextmanager
def losing_proxy(endpoint: str, method: str, answers_lost: int) -> Iterator[str]:
    """The endpoint of a proxy before `endpoint`; each connection carries one request."""
    where = urlsplit(endpoint)
    listener = socket.create_server(("127.0.0.1", 0))
    seen = count()

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection((where.hostname or "", where.port or 80)) as server:
            head = client.recv(65536)
            loses = head.startswith(method.encode()) and next(seen) < answers_lost
            server.sendall(head)
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            if not loses:
                _copy(server, client)
            else:
                _lose_answer(server, client)
            # Closing is not enough while the other thread still reads.
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def _lose_answer(server: socket.socket, client: socket.socket) -> None:
    """Wait until the server has done its work; that the connection ends is all that the client learns."""
    while (answer := server.recv(65536)).startswith(b"HTTP/1.1 100"):
        # Only asks for the request's body.
        client.sendall(answer)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
