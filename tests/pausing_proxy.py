"""A TCP proxy that can be switched off and on: a store that is away for a while."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


class PausingProxy:
    """Listens on this machine for connections to `endpoint`; refuses them while it is off."""

    def __init__(self, endpoint: str) -> None:
        where = urlsplit(endpoint)
        self._server = (where.hostname or "", where.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.is_on = True
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def switch(self, is_on: bool) -> None:
        self.is_on = is_on
        while not is_on and self._open:
            _close(self._open.pop())

    def close(self) -> None:
        self.switch(False)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self.is_on:
                    client.close()
                    continue
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._server)
        self._open += [client, server]
        threading.Thread(target=_copy, args=(client, server), daemon=True).start()
        _copy(server, client)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
