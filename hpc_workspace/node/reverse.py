"""Reverse forwards: a port of this node that only this workspace can use, and what comes there goes to its client.

The client cannot be called from here, so it parks connections: each waits at the door until somebody inside connects,
is told so by one byte, and then carries that connection. A forward outlives its parked connections for a while, so that
a client whose way broke comes back to the same port.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable

from hpc_workspace import clock, procfs
from hpc_workspace.accepting import accept_each
from hpc_workspace.node.identity import Family

log = logging.getLogger(__name__)

GO = b"\x01"
# What a client says on a parked connection when it wants no more of them; before it is used it says nothing else.
BYE = b"\x00"
_PARKED_WAIT_S = 60.0
_ORPHANED_S = 300.0


class _Parked:
    """A connection of the client's that waits to be used; whoever brought it waits for `done`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.done = threading.Event()
        self._lock = threading.Lock()
        self._is_used = False

    def wait(self) -> bool:
        """Until its client is gone, or it was used and that is over. Returns whether the client wants no more."""
        said = b""
        with contextlib.suppress(OSError):
            said = self.connection.recv(1, socket.MSG_PEEK)
        with self._lock:
            if not self._is_used:
                self.done.set()
                return said == BYE
        self.done.wait()
        return False

    def wake(self) -> bool:
        """Tell the client that it is wanted; False if it is gone."""
        with self._lock:
            if self.done.is_set():
                return False
            self._is_used = True
        try:
            self.connection.sendall(GO)
        except OSError:
            self.done.set()
            return False
        return True


class Reverse:
    """One forward: a listener on 127.0.0.1 and the connections parked for it.

    Args:
        port: to listen on; None: any that is free.
        relay: moves bytes between two connections until both have ended.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self, port: int | None, *, family: Family, relay: Callable[[socket.socket, socket.socket], None]
    ) -> None:
        self._family = family
        self._relay = relay
        self._parked: queue.Queue[_Parked] = queue.Queue()
        self._count = 0
        self._lock = threading.Lock()
        self._alone_since: clock.Deadline | None = None
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # A port whose connections have just ended can be used again; one that somebody listens on is refused.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind(("127.0.0.1", port or 0))
            self._listener.listen(128)
        except OSError:
            self._listener.close()
            raise
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=accept_each, args=(self._listener, self._serve), daemon=True).start()

    @property
    def is_orphaned(self) -> bool:
        """Whether its client has parked nothing for so long that it will not come back."""
        with self._lock:
            return self._count == 0 and self._alone_since is not None and self._alone_since.is_over

    def park(self, connection: socket.socket) -> None:
        """Keep a connection of the client's until it was used or has ended."""
        parked = _Parked(connection)
        with self._lock:
            self._count += 1
        self._parked.put(parked)
        if parked.wait():
            self.close()
        with self._lock:
            self._count -= 1
            self._alone_since = clock.Deadline(_ORPHANED_S) if self._count == 0 else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, connection: socket.socket, address: tuple[str, int]) -> None:
        with contextlib.closing(connection):
            if not self._is_ours(address):
                log.warning("reverse forward %d: turned a stranger's connection away", self.port)
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            parked = self._take()
            if parked is None:
                log.warning("reverse forward %d: the client is not there", self.port)
                return
            try:
                self._relay(connection, parked.connection)
            finally:
                parked.done.set()

    def _is_ours(self, address: tuple[str, int]) -> bool:
        # By the socket's holder alone: inside a container with subordinate ids our own processes have many users.
        peer = procfs.tcp_peer(*address, self.port)
        return peer is not None and self._family.holds(peer.inode)

    def _take(self) -> _Parked | None:
        """A parked connection whose client is there, and knows that it is wanted; None if none comes in time."""
        deadline = clock.Deadline(_PARKED_WAIT_S)
        while not deadline.is_over:
            try:
                parked = self._parked.get(timeout=deadline.left_s)
            except queue.Empty:
                return None
            if parked.wake():
                return parked
        return None
