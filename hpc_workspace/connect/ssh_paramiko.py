"""The route through SSH inside this process: one connection to the node, a channel for each stream.

The only module that uses paramiko. Two things make a channel as quick as a bare socket: TCP_NODELAY on our side, set
before the first byte, and one command run in a session, after which sshd sets it on its own (OpenSSH 9.2 to 10.0);
without them every small request waits some 43 ms for a delayed ACK.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import AuthError, HostKeyError, TunnelError
from hpc_workspace.record import Record

if TYPE_CHECKING:
    import paramiko

_CONNECT_TIMEOUT_S = 20.0
_KEEPALIVE_S = 30
_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
# paramiko 5.1 ranks AES-GCM last although it is by far the quickest with AES instructions.
_CIPHERS_FIRST = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")

# paramiko logs as errors what it also raises, and what we then try another way: silent unless somebody asks for it.
_LOG_CHANNEL = "hpc_workspace.connect.paramiko"
logging.getLogger(_LOG_CHANNEL).setLevel(logging.CRITICAL)


class _Shared:
    """One SSH connection of this process to one node, used by every workspace there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.client: paramiko.SSHClient | None = None
        self.users = 0


_shared: dict[tuple[str, str], _Shared] = {}
_shared_lock = threading.Lock()


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
        try:
            self._channel.sendall(data)
        except EOFError as error:
            raise BrokenPipeError("the SSH connection is gone") from error

    def settimeout(self, timeout_s: float | None) -> None:
        self._channel.settimeout(timeout_s)

    def is_readable(self) -> bool:
        return bool(self._channel.recv_ready() or self._channel.closed or self._channel.eof_received)

    def close(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._channel.close()


class ParamikoRoute:
    """Channels to the door's port over this process's one SSH connection to the node."""

    name = "paramiko"

    def __init__(self, record: Record) -> None:
        self._record = record
        self._settings = _lookup_settings(record.node)
        key = (self._settings["hostname"], self._settings["user"])
        with _shared_lock:
            self._connection = _shared.setdefault(key, _Shared())
            self._connection.users += 1
        self._closed = False

    def open(self) -> Stream:
        import paramiko

        transport = self._transport()
        try:
            target = ("127.0.0.1", self._record.port)
            return _ChannelStream(
                transport.open_channel("direct-tcpip", target, ("127.0.0.1", 0), timeout=_CONNECT_TIMEOUT_S)
            )
        except paramiko.ChannelException as error:
            # 1: administratively prohibited, 2: connect failed (RFC 4254, 5.1).
            refused = error.code == 1
            raise TunnelError(
                f"sshd on {self._record.node} "
                + ("forbids forwarding." if refused else f"finds nobody at the door's port {self._record.port}."),
                node=self._record.node,
                evidence=str(error),
                remedy="Set AllowTcpForwarding yes in its sshd_config, or use another route."
                if refused
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
            client, last = self._connection.client, self._connection.users == 0
            if last:
                self._connection.client = None
        if last and client is not None:
            client.close()

    def _transport(self) -> paramiko.Transport:
        with self._connection.lock:
            client = self._connection.client
            transport = client.get_transport() if client else None
            if transport is None or not transport.is_active():
                if client is not None:
                    client.close()
                client = _connect(self._record.node, self._settings)
                self._connection.client = client
                transport = client.get_transport()
            assert transport is not None
            return transport


def _lookup_settings(node: str) -> dict[str, Any]:
    """What ~/.ssh/config says about `node`: hostname, user, port, identity files."""
    import paramiko

    found: dict[str, Any] = {}
    path = Path("~/.ssh/config").expanduser()
    if path.is_file():
        config = paramiko.SSHConfig.from_path(str(path))
        found = dict(config.lookup(node))
    return {
        "hostname": found.get("hostname", node),
        "user": found.get("user", getpass.getuser()),
        "port": int(found.get("port", 22)),
        "identities": found.get("identityfile"),
    }


def _connect(node: str, settings: dict[str, Any]) -> paramiko.SSHClient:
    import paramiko

    client = paramiko.SSHClient()
    client.set_log_channel(_LOG_CHANNEL)
    client.load_system_host_keys()
    if _SYSTEM_KNOWN_HOSTS.is_file():
        client.load_system_host_keys(str(_SYSTEM_KNOWN_HOSTS))
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        raw = socket.create_connection((settings["hostname"], settings["port"]), timeout=_CONNECT_TIMEOUT_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect(
            settings["hostname"],
            port=settings["port"],
            username=settings["user"],
            key_filename=settings["identities"],
            sock=raw,
            timeout=_CONNECT_TIMEOUT_S,
            banner_timeout=_CONNECT_TIMEOUT_S,
            auth_timeout=_CONNECT_TIMEOUT_S,
            transport_factory=_tuned_transport,
        )
        transport = client.get_transport()
        assert transport is not None
        transport.set_keepalive(_KEEPALIVE_S)
        client.exec_command("true")[1].channel.recv_exit_status()
    except BaseException as error:
        client.close()
        if isinstance(error, (paramiko.SSHException, OSError, EOFError)):
            raise _ssh_error(node, settings, error) from error
        raise
    return client


def _tuned_transport(sock: Any, **options: Any) -> paramiko.Transport:
    import paramiko

    transport = paramiko.Transport(sock, **options)
    security = transport.get_security_options()
    known = tuple(security.ciphers)
    first = tuple(cipher for cipher in _CIPHERS_FIRST if cipher in known)
    security.ciphers = first + tuple(cipher for cipher in known if cipher not in first)
    return transport


def _ssh_error(node: str, settings: dict[str, Any], error: Exception) -> TunnelError:
    """`error` as one of ours, with what to do about it."""
    import paramiko

    where = f"{settings['user']}@{settings['hostname']} (port {settings['port']})"
    if isinstance(error, paramiko.BadHostKeyException) or "not found in known_hosts" in str(error):
        return HostKeyError(
            f"The host key of {node} is not the one that is known, or is unknown.",
            node=node,
            evidence=str(error),
            remedy=f"Check it with your site, then: ssh-keyscan {settings['hostname']} >> ~/.ssh/known_hosts",
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
