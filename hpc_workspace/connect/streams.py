"""What every way to the door has in common: a stream of bytes, and the exchange that opens it."""

from __future__ import annotations

import contextlib
import select
import socket
from typing import Protocol

from hpc_workspace import exchange
from hpc_workspace.errors import AuthError, ServerUnavailableError, TunnelError, TunnelLostError, WorkspaceError
from hpc_workspace.exchange import ExchangeError, Verdict, Wish

EXCHANGE_TIMEOUT_S = 20.0


class Stream(Protocol):
    """A connection that carries bytes both ways.

    `recv` gives at least one byte, or none at the end. All but `close` raise OSError when it is broken, and
    TimeoutError (which is one) when the time set by `settimeout` runs out; None waits for ever. `is_readable` says
    whether `recv` would return at once: with bytes, or because the other side ended it. `abandon` lets go of it in a
    forked child, so that the parent's goes on and is not held.
    """

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> object: ...
    def settimeout(self, timeout_s: float | None, /) -> object: ...
    def close(self) -> object: ...
    def is_readable(self) -> bool: ...
    def abandon(self) -> object: ...


class SocketStream:
    """A socket as a `Stream`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def recv(self, size: int) -> bytes:
        return self._connection.recv(size)

    def sendall(self, data: bytes) -> None:
        self._connection.sendall(data)

    def settimeout(self, timeout_s: float | None) -> None:
        self._connection.settimeout(timeout_s)

    def is_readable(self) -> bool:
        if self._connection.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        # A thread may be blocked in recv on it: closing alone would not wake that.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def abandon(self) -> None:
        self._connection.close()


class Route(Protocol):
    """One way to one node's door, kept open for many streams.

    Guarantees: `open` gives a new stream that ends at whatever listens at the door's address, unproven. It raises
    TunnelError, with the reason, when there is no way. `close` ends the route and all of its streams.
    """

    name: str

    def open(self) -> Stream: ...
    def close(self) -> None: ...


class DoorStream:
    """A stream through the door, proven on both sides. The verdict is read with the first bytes, not waited for."""

    def __init__(self, stream: Stream, node: str) -> None:
        self._stream = stream
        self._node = node
        self._said: str | None = None

    def wait_granted(self) -> str:
        """Make sure that the door granted the wish. Returns what it said of it, often nothing.

        Raises:
            TunnelLostError: the connection broke, or the door says nothing for 20 s.
            ServerUnavailableError, TunnelError: as `_read_verdict`.
        """
        try:
            self._stream.settimeout(EXCHANGE_TIMEOUT_S)
            said = self._read_verdict()
            self._stream.settimeout(None)
        except WorkspaceError:
            raise
        except OSError as error:
            raise TunnelLostError(
                f"The door on {self._node} did not answer a wish.", node=self._node, evidence=str(error)
            ) from error
        return said

    def _read_verdict(self) -> str:
        """What the door said to the wish.

        Raises:
            ServerUnavailableError: there is no server behind the door, or a stranger's.
            RefusedError: the door refused.
            TunnelLostError: the door speaks nonsense.
            OSError: the connection broke.
        """
        if self._said is not None:
            return self._said
        try:
            verdict, length = exchange.parse_verdict_head(
                exchange.receive_exactly(self._stream, exchange.VERDICT_HEAD_BYTES)
            )
            text = exchange.receive_exactly(self._stream, length).decode("utf-8", "replace")
        except ExchangeError as error:
            raise TunnelLostError(
                f"The door on {self._node} is out of step.", node=self._node, evidence=str(error)
            ) from error
        if verdict is Verdict.REFUSED:
            raise RefusedError(f"The door on {self._node} refused: {text}.", node=self._node)
        if verdict is not Verdict.OK:
            raise ServerUnavailableError(
                f"The door on {self._node} relays to no agent server.", evidence=f"It says: {text}."
            )
        self._said = text
        return text

    def wait_ended(self) -> None:
        """Wait until the other side has ended the stream. Raises OSError (TimeoutError) when it breaks, or does not."""
        while self.recv(1024):
            continue

    def recv(self, size: int) -> bytes:
        self._read_verdict()
        return self._stream.recv(size)

    def sendall(self, data: bytes) -> None:
        self._stream.sendall(data)

    def settimeout(self, timeout_s: float | None) -> None:
        self._stream.settimeout(timeout_s)

    def is_readable(self) -> bool:
        return self._stream.is_readable()

    def close(self) -> None:
        self._stream.close()

    def abandon(self) -> None:
        self._stream.abandon()


class RefusedError(TunnelError):
    """The door was reached, and does not grant the wish: another try will not do better."""


def open_door(route: Route, node: str, token: str, workspace_id: str, wish: Wish) -> DoorStream:
    """A stream to what is wished for. Nothing but a nonce is sent before the door has proven itself.

    Raises:
        AuthError: whoever listens there is not this workspace's door.
        TunnelError: there is no way, or it broke.
    """
    stream = route.open()
    try:
        stream.settimeout(EXCHANGE_TIMEOUT_S)
        client_nonce = exchange.make_nonce()
        stream.sendall(exchange.build_hello(client_nonce))
        answer = exchange.receive_exactly(stream, exchange.ANSWER_BYTES)
        door_nonce = exchange.parse_answer(answer, token, workspace_id, client_nonce)
        stream.sendall(exchange.build_request(token, workspace_id, client_nonce, door_nonce, wish))
        stream.settimeout(None)
    except ExchangeError as error:
        stream.close()
        raise AuthError(
            f"The listener at the address of workspace {workspace_id} on {node} is not its door.",
            node=node,
            evidence=f"By route {route.name}: {error}. Nothing was sent to it.",
            remedy="The workspace has probably ended and its port was taken; start a new one.",
        ) from error
    except OSError as error:
        stream.close()
        raise TunnelError(
            f"The door of workspace {workspace_id} on {node} does not answer.",
            node=node,
            evidence=f"By route {route.name}: {error or type(error).__name__}.",
        ) from error
    except BaseException:
        stream.close()
        raise
    return DoorStream(stream, node)
