"""Whose listener is it? Nothing is relayed to a socket that is not held by this workspace's own container."""

from __future__ import annotations

import os
import socket
import struct

from hpc_workspace import procfs


class NotOursError(Exception):
    """The listener belongs to somebody or something else."""


class Family:
    """The processes of one container: all that descend from this node program.

    The node program is a subreaper, so that a process that lost its parent is still its descendant, whatever session
    or group it moved to.
    """

    def __init__(self, root_pid: int | None = None) -> None:
        self._root_pid = root_pid or os.getpid()
        self._known_inodes: dict[int, int] = {}

    def require_tcp_listener(self, port: int) -> None:
        """Make sure that whoever listens on 127.0.0.1:port is one of ours.

        Call it after connecting: the inode of a listener that answered can't have changed hands since.

        Raises:
            NotOursError: it is not, or nobody listens.
        """
        listener = procfs.tcp_listener(port)
        if listener is None:
            raise NotOursError(f"nobody listens on port {port}")
        if listener.uid == os.getuid() and self._known_inodes.get(port) == listener.inode:
            return
        if not self.holds(listener.inode):
            raise NotOursError(f"the listener on port {port} is not this workspace's")
        self._known_inodes[port] = listener.inode

    def holds(self, inode: int) -> bool:
        """Whether one of ours has the socket with this inode open."""
        return any(procfs.holds_socket(process.pid, inode) for process in procfs.descendants(self._root_pid))

    def require_unix_peer(self, connection: socket.socket) -> None:
        """Make sure that the listener that `connection` reached was bound by one of ours.

        Raises:
            NotOursError: it was not.
        """
        # unix(7), SO_PEERCRED: of whoever called listen(2), in our PID namespace; struct ucred is three ints.
        pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid() or pid not in {process.pid for process in procfs.descendants(self._root_pid)}:
            raise NotOursError("the listener on the server's socket is not this workspace's")
