"""A port of 127.0.0.1 on the client's side for other people's clients: each connection goes on through the door."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable

from hpc_workspace import procfs
from hpc_workspace.accepting import accept_each
from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import PrerequisiteError, WorkspaceError

log = logging.getLogger(__name__)

_RELAY_BYTES = 256 * 1024


class Listener:
    """Listens until `close`; serves this user only.

    Args:
        dial: gives the stream that a connection is relayed to.
        port: to listen on; None: any that is free.

    Raises:
        PrerequisiteError: the port is taken.
    """

    def __init__(self, dial: Callable[[], Stream], port: int | None = None) -> None:
        self._dial = dial
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # A port that was closed a moment ago can be used at once; one that somebody listens on is still refused.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port or 0))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            if port is None:
                raise PrerequisiteError(
                    "No port of 127.0.0.1 is available.",
                    evidence=str(error),
                    remedy="Close what holds ports here, or widen net.ipv4.ip_local_port_range.",
                ) from error
            raise PrerequisiteError(
                f"Port {port} is not available",
                evidence=str(error),
                remedy="Choose another host_port, or leave it out.",
            ) from error
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, name=f"hpc-workspace-listener-{self.port}", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __repr__(self) -> str:
        return f"<Listener {self.url}>"

    def close(self) -> None:
        """Stop listening; open connections end when either side ends them."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        accept_each(self._socket, self._serve)

    def _serve(self, connection: socket.socket, address: tuple[str, int]) -> None:
        with contextlib.closing(connection):
            try:
                peer = procfs.tcp_peer(*address, self.port)
                is_ours = peer is not None and peer.uid == os.getuid()
            except OSError:  # no /proc here: macOS, say
                is_ours = True
            if not is_ours:
                log.warning("port %d: turned another user's connection away", self.port)
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                stream = self._dial()
            except WorkspaceError as error:
                log.warning("port %d: %s", self.port, error.what)
                return
            with contextlib.closing(stream):
                relay(connection, stream)


def relay(connection: socket.socket, stream: Stream) -> None:
    """Move bytes both ways until the stream or the connection has ended."""
    back = threading.Thread(target=_from_stream, args=(stream, connection), daemon=True)
    back.start()
    _to_stream(connection, stream)
    stream.close()
    back.join()


def _to_stream(connection: socket.socket, stream: Stream) -> None:
    with contextlib.suppress(OSError, WorkspaceError):
        while data := connection.recv(_RELAY_BYTES):
            stream.sendall(data)


def _from_stream(stream: Stream, connection: socket.socket) -> None:
    with contextlib.suppress(OSError, WorkspaceError):
        while data := stream.recv(_RELAY_BYTES):
            connection.sendall(data)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
