"""The door: the one way into a workspace. Proves itself to the client, asks the client for proof, then relays bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from hpc_workspace import clock, exchange
from hpc_workspace.exchange import ExchangeError, Verdict, Wish
from hpc_workspace.node.events import DetachRequested, EndRequested, LeasesChanged
from hpc_workspace.node.identity import Family, NotOursError
from hpc_workspace.node.reverse import Reverse
from hpc_workspace.node.server import Address, connect_port

log = logging.getLogger(__name__)

_EXCHANGE_TIMEOUT_S = 10.0
_UNPROVEN_MAX = 64
_ACCEPT_PAUSE_S = 0.05
_RELAY_BYTES = 256 * 1024


class Door:
    """Listens on a Unix socket and on a port of 127.0.0.1, a thread for each connection.

    Args:
        server: where the agent server is, asked at each connection; None while there is none.
        events: gets `LeasesChanged`, `EndRequested` and `DetachRequested`.
    """

    def __init__(
        self,
        *,
        workspace_id: str,
        token: str,
        socket_path: Path,
        family: Family,
        server: Callable[[], Address | None],
        events: queue.SimpleQueue[object],
    ) -> None:
        self._workspace_id = workspace_id
        self._token = token
        self._family = family
        self._server = server
        self._events = events
        self._lock = threading.Lock()
        self._leases: set[socket.socket] = set()
        self._reverse: dict[str, Reverse] = {}
        self._relays = 0
        self._last_active_s = clock.now_s()
        self._listeners = [_unix_listener(socket_path), _tcp_listener()]
        self.socket_path = str(socket_path)
        self.port = int(self._listeners[1].getsockname()[1])
        for listener in self._listeners:
            unproven = threading.BoundedSemaphore(_UNPROVEN_MAX)
            threading.Thread(target=self._accept, args=(listener, unproven), daemon=True).start()

    def __repr__(self) -> str:
        return f"<Door [port {self.port}, {len(self._leases)} leases, {self._relays} relays]>"

    @property
    def leases(self) -> int:
        return len(self._leases)

    @property
    def quiet_s(self) -> float:
        """Seconds since anybody was connected; 0 while somebody is."""
        with self._lock:
            return 0.0 if self._leases or self._relays else clock.now_s() - self._last_active_s

    def close(self, farewell: str) -> None:
        """Tell everybody who holds a lease that all is over, and stop listening."""
        for listener in self._listeners:
            listener.close()
        with self._lock:
            leases = list(self._leases)
            forwards = list(self._reverse.values())
        for forward in forwards:
            forward.close()
        for connection in leases:
            with contextlib.suppress(OSError):
                connection.sendall(exchange.build_verdict(Verdict.OK, farewell))
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket, unproven: threading.BoundedSemaphore) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if listener.fileno() < 0:
                    return  # closed
                log.warning("door: can't accept now: %s", error)  # out of descriptors, say
                clock.sleep(_ACCEPT_PAUSE_S)
                continue
            # Strangers can reach the port: no more of them at once than this; they can't shut the socket.
            if not unproven.acquire(blocking=False):
                connection.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(connection, unproven), daemon=True).start()
            except RuntimeError as error:
                log.warning("door: no thread for a connection: %s", error)
                unproven.release()
                connection.close()

    def _serve(self, connection: socket.socket, unproven: threading.BoundedSemaphore) -> None:
        with contextlib.closing(connection):
            try:
                try:
                    wish = self._greet(connection)
                finally:
                    unproven.release()
                self._grant(connection, wish)
            except ExchangeError as error:
                log.warning("door: turned a connection away: %s", error)
            except OSError as error:
                log.debug("door: a connection broke: %s", error)

    def _greet(self, connection: socket.socket) -> Wish:
        """The exchange up to the wish. Raises ExchangeError or OSError; the client has heard nothing secret then."""
        connection.settimeout(_EXCHANGE_TIMEOUT_S)
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client_nonce = exchange.parse_hello(exchange.receive_exactly(connection, exchange.HELLO_BYTES))
        door_nonce = exchange.make_nonce()
        connection.sendall(exchange.build_answer(self._token, self._workspace_id, client_nonce, door_nonce))
        head = exchange.receive_exactly(connection, exchange.REQUEST_HEAD_BYTES)
        said = exchange.receive_exactly(connection, exchange.parse_request_head(head))
        wish = exchange.parse_request(head, said, self._token, self._workspace_id, client_nonce, door_nonce)
        connection.settimeout(None)
        return wish

    def _grant(self, connection: socket.socket, wish: Wish) -> None:
        if wish.want in ("lease", "end", "detach"):
            if wish.want == "end":
                self._events.put(EndRequested())
            if wish.want == "detach":
                self._events.put(DetachRequested())
            self._hold_lease(connection)
            return
        if wish.want == "reverse":
            self._park(connection, wish)
            return
        try:
            server = self._connect(wish)
        except NotOursError as error:
            log.warning("door: nothing was sent to a stranger's listener: %s", error)
            connection.sendall(exchange.build_verdict(Verdict.NOT_OURS, str(error)))
        except OSError as error:
            connection.sendall(exchange.build_verdict(Verdict.NO_SERVER, str(error)))
        else:
            with contextlib.closing(server):
                connection.sendall(exchange.build_verdict(Verdict.OK))
                self._relay(connection, server)

    def _park(self, connection: socket.socket, wish: Wish) -> None:
        try:
            forward = self._forward_for(wish)
        except OSError as error:
            connection.sendall(exchange.build_verdict(Verdict.REFUSED, f"port {wish.port}: {error.strerror}"))
            return
        connection.sendall(exchange.build_verdict(Verdict.OK, str(forward.port)))
        forward.park(connection)

    def _forward_for(self, wish: Wish) -> Reverse:
        with self._lock:
            for name in [name for name, forward in self._reverse.items() if forward.is_orphaned]:
                self._reverse.pop(name).close()
            name = wish.name or ""
            if name not in self._reverse:
                self._reverse[name] = Reverse(wish.port, family=self._family, relay=self._relay)
            return self._reverse[name]

    def _connect(self, wish: Wish) -> socket.socket:
        if wish.want == "port" and wish.port is not None:
            return connect_port(wish.port, self._family)
        address = self._server()
        if address is None:
            raise OSError("the agent server is not running")
        return address.connect(self._family)

    def _hold_lease(self, connection: socket.socket) -> None:
        with self._lock:
            self._leases.add(connection)
        self._events.put(LeasesChanged(self.leases))
        try:
            connection.sendall(exchange.build_verdict(Verdict.OK))
            while connection.recv(1024):
                continue  # a lease says nothing; its end is what counts
        finally:
            with self._lock:
                self._leases.discard(connection)
                self._last_active_s = clock.now_s()
            self._events.put(LeasesChanged(self.leases))

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._relays += 1
        try:
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()
        finally:
            with self._lock:
                self._relays -= 1
                self._last_active_s = clock.now_s()


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Move bytes until `source` ends, then end that direction of `target`."""
    buffer = memoryview(bytearray(_RELAY_BYTES))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _unix_listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old_umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(old_umask)
    listener.listen(128)
    return listener


def _tcp_listener() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener
