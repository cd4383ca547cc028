"""A port inside the workspace for one of this machine's: connections made there arrive here, and go on to ours."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
from collections.abc import Callable

from hpc_workspace import clock
from hpc_workspace.connect.listener import relay
from hpc_workspace.connect.streams import DoorStream, RefusedError
from hpc_workspace.errors import TunnelError, WorkspaceError
from hpc_workspace.exchange import Wish

log = logging.getLogger(__name__)

# So many connections at one moment find a parked one waiting; each that is used is replaced at once.
_PARKED = 4
_BYE = b"\x00"
_CONNECT_TIMEOUT_S = 10.0
_TRIES_S = (0.1, 10.0)


class Reverse:
    """Serves the workspace, and nobody else on its node, until `close`; keeps its port when the way is made anew.

    After a restart of its job the port may be taken there, and `url` is another.

    Args:
        dial: gives a stream to the door, through whatever becomes of the way to it.
        port: of 127.0.0.1 here, where connections from inside go.

    Raises:
        WorkspaceError: the door can't be reached, or refused.
    """

    def __init__(self, dial: Callable[[Wish], DoorStream], port: int) -> None:
        self._dial = dial
        self._target = port
        self._name = secrets.token_hex(8)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._streams: set[DoorStream] = set()
        self.port = 0
        first = self._park()
        for stream in (first, *[None] * (_PARKED - 1)):
            threading.Thread(target=self._serve, args=(stream,), name=f"reverse-{self.port}", daemon=True).start()

    @property
    def url(self) -> str:
        """The address inside the workspace."""
        return f"http://127.0.0.1:{self.port}"

    def __repr__(self) -> str:
        return f"<Reverse {self.url} inside -> 127.0.0.1:{self._target} here>"

    def close(self) -> None:
        """Serve no new connections; those that are open end when either side ends them."""
        self._closed.set()
        with self._lock:
            parked = list(self._streams)
        with contextlib.suppress(OSError, IndexError):
            parked[0].sendall(_BYE)
        for stream in parked:
            stream.close()

    def _park(self) -> DoorStream:
        stream = self._dial(Wish(want="reverse", name=self._name, port=self.port or None))
        try:
            self.port = int(stream.wait_granted())
        except BaseException:
            stream.close()
            raise
        return stream

    def _serve(self, stream: DoorStream | None) -> None:
        """Park, wait until wanted, hand over, and park again; whatever breaks is tried again."""
        pauses_s = clock.pauses_s(*_TRIES_S)
        while not self._closed.is_set():
            try:
                stream = stream or self._park()
                pauses_s = clock.pauses_s(*_TRIES_S)
                if self._wait_wanted(stream):
                    threading.Thread(target=self._carry, args=(stream,), daemon=True).start()
            except RefusedError as error:
                # After a restart, on another node: somebody has that port there.
                log.warning("%r needs another port: %s", self, error.what)
                self.port = 0
            except TunnelError as error:
                log.info("%r: %s", self, error.what)
                self._closed.wait(next(pauses_s))
            except WorkspaceError as error:
                if not self._closed.is_set():
                    log.warning("%r has ended: %s", self, error.what)
                return
            stream = None

    def _wait_wanted(self, stream: DoorStream) -> bool:
        with self._lock:
            self._streams.add(stream)
        try:
            if not self._closed.is_set() and stream.recv(1):
                return True
        except OSError as error:
            log.debug("%r: a parked connection broke: %s", self, error)
        finally:
            with self._lock:
                self._streams.discard(stream)
        stream.close()
        return False

    def _carry(self, stream: DoorStream) -> None:
        with contextlib.closing(stream):
            try:
                connection = socket.create_connection(("127.0.0.1", self._target), timeout=_CONNECT_TIMEOUT_S)
            except OSError as error:
                log.warning("%r: nobody listens here: %s", self, error)
                return
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.closing(connection):
                relay(connection, stream)
