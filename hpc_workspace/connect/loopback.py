"""The route on the same node: the door's Unix socket, or its port on 127.0.0.1 where the socket can't be seen."""

from __future__ import annotations

import socket
from pathlib import Path

from hpc_workspace.connect.streams import SocketStream, Stream
from hpc_workspace.errors import TunnelError
from hpc_workspace.record import Record

_CONNECT_TIMEOUT_S = 5.0


def is_this_node(node: str) -> bool:
    """Whether `node` (a short name) is this machine."""
    return socket.gethostname().partition(".")[0] == node


class LoopbackRoute:
    """Straight to the door, without SSH."""

    name = "loopback"

    def __init__(self, record: Record) -> None:
        if not is_this_node(record.node):
            raise TunnelError(f"{record.node} is another machine than this one.", node=record.node)
        self._record = record

    def open(self) -> Stream:
        record = self._record
        try:
            if Path(record.socket).exists():
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(_CONNECT_TIMEOUT_S)
                connection.connect(record.socket)
            else:
                # Never "localhost": that may be ::1, where somebody else may listen.
                connection = socket.create_connection(("127.0.0.1", record.port), timeout=_CONNECT_TIMEOUT_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise TunnelError(
                f"Nobody listens at the door's address on this machine ({record.node}).",
                node=record.node,
                evidence=f"{record.socket}, port {record.port}: {error}",
                remedy="The workspace has probably ended: see its exit_reason in record.json.",
            ) from error
        return SocketStream(connection)

    def close(self) -> None:
        """Nothing is kept open between streams."""
