"""Real listeners for tests: what the far end of a stream is connected with."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path


def echo(connection: socket.socket) -> None:
    """Send everything back, and the end after it."""
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


class Listeners:
    """A Unix socket and a port of 127.0.0.1 that serve each connection in a thread, until `close`."""

    def __init__(self, directory: Path, serve: Callable[[socket.socket], None] = echo) -> None:
        self.path = directory / "socket"
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(self.path))
        unix.listen(128)
        port = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = port.getsockname()[1]
        self._serve = serve
        self._sockets = [unix, port]
        for listener in self._sockets:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    @property
    def targets(self) -> list[str]:
        return [f"unix:{self.path}", f"tcp:{self.port}"]

    def close(self) -> None:
        for listener in self._sockets:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(listener.accept()[0],), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self._serve(connection)
