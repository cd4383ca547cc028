"""The route through SSH inside this process: one connection to the node, a channel for each stream.

The only module that uses paramiko. Two things make a channel as quick as a bare socket: TCP_NODELAY on our side, set
before the first byte, and one command run in a session, after which sshd sets it on its own (OpenSSH 9.2 to 10.0);
without them every small request waits some 43 ms for a delayed ACK.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_workspace.connect.ssh_config import SshSettings, read_settings
from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import AuthError, HostKeyError, TunnelError
from hpc_workspace.record import Record

if TYPE_CHECKING:
    import paramiko

_CONNECT_TIMEOUT_S = 20.0
_KEEPALIVE_S = 30
_SHELL_TIMEOUT_S = 5.0
# The kernel gives up a connection whose bytes nobody has confirmed for so long (tcp(7), TCP_USER_TIMEOUT): a node that
# is gone says nothing, and a link that is down for a while comes back before.
_SILENT_MAX_MS = 60_000
# sshd's extension for Unix sockets; OpenSSH's PROTOCOL, 2.4.
_STREAMLOCAL = "direct-streamlocal@openssh.com"
# RFC 4254, 5.1: 1 administratively prohibited, 2 connect failed, 3 unknown channel type.
_PROHIBITED, _UNKNOWN_TYPE = 1, 3
# The most that sshd takes in a packet (OpenSSH's CHAN_SES_PACKET_DEFAULT).
_PACKET_BYTES = 32 * 1024
# paramiko 5.1 ranks AES-GCM last although it is by far the quickest with AES instructions.
_CIPHERS_FIRST = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")

# paramiko logs as errors what it also raises, and what we then try another way: silent unless somebody asks for it.
_LOG_CHANNEL = "hpc_workspace.connect.paramiko"
logging.getLogger(_LOG_CHANNEL).setLevel(logging.CRITICAL)


def load() -> None:
    """Import paramiko now, while there is time for it, and not at the first connection."""
    import paramiko  # noqa: F401


class _Shared:
    """One SSH connection of this process to one node, used by every workspace there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.client: paramiko.SSHClient | None = None
        self.hops: list[paramiko.SSHClient] = []
        self.users = 0

    def close(self) -> None:
        """End the connection, and those that it goes through."""
        clients = [self.client, *reversed(self.hops)]
        self.client, self.hops = None, []
        for client in clients:
            if client is not None:
                client.close()


_shared: dict[tuple[str, str], _Shared] = {}
_shared_lock = threading.Lock()


def _forget_after_fork() -> None:
    """A forked child has a copy of each connection, and every word of it there would break the parent's."""
    global _shared_lock
    _shared_lock = threading.Lock()
    for shared in _shared.values():
        for client in (shared.client, *shared.hops):
            transport = client.get_transport() if client is not None else None
            if transport is not None:
                transport.sock.close()  # the descriptor alone: nothing is said
    _shared.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


class _ChannelStream:
    """A channel as a `Stream`. paramiko says EOFError of a connection that is gone, and means an OSError."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def recv(self, size: int) -> bytes:
        try:
            return self._channel.recv(size)
        except EOFError as error:  # it tells the other side that there is room again
            raise ConnectionResetError("the SSH connection is gone") from error

    def sendall(self, data: bytes) -> None:
        # Not paramiko's own: after each packet it copies all that is left, seventeen times a MiB in all.
        view = memoryview(data)
        try:
            while view:
                view = view[self._channel.send(bytes(view[:_PACKET_BYTES])) :]
        except EOFError as error:
            raise BrokenPipeError("the SSH connection is gone") from error

    def settimeout(self, timeout_s: float | None) -> None:
        self._channel.settimeout(timeout_s)

    def is_readable(self) -> bool:
        return bool(self._channel.recv_ready() or self._channel.closed or self._channel.eof_received)

    def close(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._channel.close()

    def abandon(self) -> None:
        """Nothing: the connection that it is a part of was let go (`_forget_after_fork`)."""


class ParamikoRoute:
    """Channels to the door's port over this process's one SSH connection to the node."""

    name = "paramiko"

    def __init__(self, record: Record) -> None:
        self._record = record
        self._settings = read_settings(record.node)
        with _shared_lock:
            self._connection = _shared.setdefault((self._settings.hostname, self._settings.user), _Shared())
            self._connection.users += 1
        self._may_use_socket = bool(record.socket)
        self._closed = False

    def open(self) -> Stream:
        import paramiko

        transport = self._transport()
        try:
            if self._may_use_socket:
                with contextlib.suppress(paramiko.ChannelException):
                    return _ChannelStream(_open_socket(transport, self._record.socket))
                # Forbidden, or another /tmp than ours: it stays so.
                self._may_use_socket = False
            return _ChannelStream(_open_port(transport, self._record.port))
        except paramiko.ChannelException as error:
            is_forbidden = error.code == _PROHIBITED
            raise TunnelError(
                f"sshd on {self._record.node} "
                + ("forbids forwarding." if is_forbidden else f"finds nobody at the door's port {self._record.port}."),
                node=self._record.node,
                evidence=str(error),
                remedy="Set AllowTcpForwarding yes in its sshd_config, or use another route."
                if is_forbidden
                else "The workspace has probably ended: see exit_reason in its record.json.",
            ) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise TunnelError(
                f"The SSH connection to {self._record.node} broke.", node=self._record.node, evidence=str(error)
            ) from error

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with _shared_lock:
            self._connection.users -= 1
            is_last = self._connection.users == 0
        if is_last:
            self._connection.close()

    def _transport(self) -> paramiko.Transport:
        with self._connection.lock:
            client = self._connection.client
            transport = client.get_transport() if client else None
            if transport is None or not transport.is_active():
                self._connection.close()
                client, self._connection.hops = _connect(self._settings)
                self._connection.client = client
                transport = client.get_transport()
            assert transport is not None
            return transport


def _open_port(transport: paramiko.Transport, port: int) -> paramiko.Channel:
    return transport.open_channel("direct-tcpip", ("127.0.0.1", port), ("127.0.0.1", 0), timeout=_CONNECT_TIMEOUT_S)


def _open_socket(transport: paramiko.Transport, path: str) -> paramiko.Channel:
    """A channel to a Unix socket of the node, which paramiko 5.1 has no words for: they are added as it is sent."""
    _pending.path = path
    try:
        return transport.open_channel(_STREAMLOCAL, timeout=_CONNECT_TIMEOUT_S)
    finally:
        _pending.path = None


_pending = threading.local()


def _connect(settings: SshSettings) -> tuple[paramiko.SSHClient, list[paramiko.SSHClient]]:
    """A connection to the host, and those to the hosts that it goes through, nearest first.

    Raises:
        TunnelError: it can't be made; HostKeyError, AuthError where that is why.
    """
    import paramiko

    hops: list[paramiko.SSHClient] = []
    client = paramiko.SSHClient()
    client.set_log_channel(_LOG_CHANNEL)
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        if settings.proxy_command:
            raise TunnelError(
                f"ssh's configuration has a ProxyCommand for {settings.host}.",
                node=settings.host,
                remedy='connect="openssh" runs it.',
            )
        for path in settings.known_hosts:
            if Path(path).expanduser().is_file():
                client.load_system_host_keys(str(Path(path).expanduser()))
        if settings.jump:
            *before, last = settings.jump
            hop, hops = _connect(read_settings(last, jump=tuple(before)))
            hops.append(hop)
        client.connect(
            settings.host_key_alias or settings.hostname,  # the name that its key is looked up by
            port=22 if settings.host_key_alias else settings.port,
            username=settings.user,
            key_filename=list(settings.identities) or None,  # type: ignore[arg-type]  # it takes a list too
            look_for_keys=not settings.identities,
            allow_agent=not settings.identities_only,
            sock=_open_way(settings, hops[-1] if hops else None),
            timeout=_CONNECT_TIMEOUT_S,
            banner_timeout=_CONNECT_TIMEOUT_S,
            auth_timeout=_CONNECT_TIMEOUT_S,
            transport_factory=_tuned_transport,
        )
        transport = client.get_transport()
        assert transport is not None
        transport.set_keepalive(_KEEPALIVE_S)
        _run_something(client)
    except BaseException as error:
        for opened in (client, *reversed(hops)):
            opened.close()
        if isinstance(error, (paramiko.SSHException, OSError, EOFError)) and not isinstance(error, TunnelError):
            raise _ssh_error(settings, error) from error
        raise
    return client, hops


def _run_something(client: paramiko.SSHClient) -> None:
    """Have sshd set TCP_NODELAY. It is for speed alone: a login shell that hangs there holds nobody up for long."""
    channel = client.exec_command("true", timeout=_CONNECT_TIMEOUT_S)[1].channel
    channel.status_event.wait(_SHELL_TIMEOUT_S)
    channel.close()


def _open_way(settings: SshSettings, hop: paramiko.SSHClient | None) -> Any:
    """What the connection goes over: a socket, or a channel of the last host on the way."""
    if hop is not None:
        transport = hop.get_transport()
        assert transport is not None
        return transport.open_channel(
            "direct-tcpip", (settings.hostname, settings.port), ("127.0.0.1", 0), timeout=_CONNECT_TIMEOUT_S
        )
    raw = socket.create_connection((settings.hostname, settings.port), timeout=_CONNECT_TIMEOUT_S)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENT_MAX_MS)
    return raw


def _tuned_transport(sock: Any, **options: Any) -> paramiko.Transport:
    import paramiko

    class Tuned(paramiko.Transport):
        """Says which Unix socket a channel is to: the fields that follow an open of that type (PROTOCOL, 2.4)."""

        def _send_user_message(self, data: paramiko.Message) -> None:
            if (path := getattr(_pending, "path", None)) is not None:
                data.add_string(path)
                data.add_string("")
                data.add_int(0)
                _pending.path = None
            super()._send_user_message(data)  # type: ignore[misc]

    transport = Tuned(sock, **options)
    security = transport.get_security_options()
    known = tuple(security.ciphers)
    first = tuple(cipher for cipher in _CIPHERS_FIRST if cipher in known)
    security.ciphers = first + tuple(cipher for cipher in known if cipher not in first)
    return transport


def _ssh_error(settings: SshSettings, error: Exception) -> TunnelError:
    """`error` as one of ours, with what to do about it."""
    import paramiko

    node, where = settings.host, str(settings)
    if isinstance(error, paramiko.BadHostKeyException) or "not found in known_hosts" in str(error):
        return HostKeyError(
            f"The host key of {node} is not the one that is known, or is unknown.",
            node=node,
            evidence=str(error),
            remedy=f"Check it with your site, then: ssh-keyscan {settings.hostname} >> ~/.ssh/known_hosts",
        )
    if isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
        return AuthError(
            f"SSH to {where} was refused.",
            node=node,
            evidence=str(error),
            remedy=f"Make `ssh {node} true` work without a password: ssh-keygen, then append the public key to "
            "~/.ssh/authorized_keys.",
        )
    return TunnelError(
        f"SSH to {where} does not answer.",
        node=node,
        evidence=str(error) or type(error).__name__,
        remedy=f"Try: ssh -v {node} true",
    )
