"""The route through the system's `ssh`, for sites whose logins paramiko can't do (hostbased, Kerberos, 2FA).

One `ssh -W` a stream, all over one ControlMaster connection. Source: ssh(1) and ssh_config(5), OpenSSH 10.0.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import tempfile
from pathlib import Path

from hpc_workspace import processes
from hpc_workspace.connect.streams import SocketStream, Stream
from hpc_workspace.errors import TunnelError
from hpc_workspace.record import Record

_CONNECT_TIMEOUT_S = 20
# Before ssh's own order, which begins with ChaCha20: with AES instructions this is several times as quick for bulk.
_CIPHERS = "^aes128-gcm@openssh.com,aes256-gcm@openssh.com"


def build_forward_argv(node: str, port: int, control_dir: str) -> list[str]:
    """The argv that connects its stdin and stdout with 127.0.0.1:port of `node`."""
    options = {
        "BatchMode": "yes",
        "ControlMaster": "auto",
        "ControlPath": f"{control_dir}/%C",
        "ControlPersist": "60",
        "ConnectTimeout": str(_CONNECT_TIMEOUT_S),
        "Ciphers": _CIPHERS,
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return ["ssh", *flags, "-W", f"127.0.0.1:{port}", "--", node]


def build_exit_argv(node: str, control_dir: str) -> list[str]:
    """The argv that ends the shared connection."""
    return ["ssh", "-o", f"ControlPath={control_dir}/%C", "-O", "exit", "--", node]


class _PipedStream(SocketStream):
    """A socket whose other end is the stdin and stdout of `ssh -W`."""

    def __init__(self, connection: socket.socket, child: processes.Child, log: Path) -> None:
        super().__init__(connection)
        self._child = child
        self._log = log
        self._has_received = False

    def recv(self, size: int) -> bytes:
        try:
            data = super().recv(size)
        except ConnectionResetError:
            data = b""
        if not data and not self._has_received:
            # ssh never got through: what it printed is the reason.
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise ConnectionAbortedError(f"ssh says: {said[-1]}" if said else "ssh ended without a word")
        self._has_received = True
        return data

    def close(self) -> None:
        super().close()
        if self._child.wait(1.0) is None:
            self._child.send_signal(signal.SIGTERM)
            self._child.wait(1.0)


class OpenSshRoute:
    """Streams through the user's own ssh and its configuration."""

    name = "openssh"

    def __init__(self, record: Record) -> None:
        self._record = record
        if processes.find_program("ssh") is None:
            raise TunnelError("There is no ssh on PATH.", node=record.node)
        # Short and ours alone: a control socket's path has the limit of 108 bytes that every Unix socket has.
        self._control_dir = tempfile.TemporaryDirectory(prefix="hpcws-ssh-", dir="/tmp")
        self._log = Path(self._control_dir.name, "log")

    def open(self) -> Stream:
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as log:
            argv = build_forward_argv(self._record.node, self._record.port, self._control_dir.name)
            child = processes.spawn(argv, output=log, stdio=theirs.fileno())
        return _PipedStream(ours, child, self._log)

    def close(self) -> None:
        # If it does not answer, ControlPersist ends it in a minute.
        with contextlib.suppress(processes.ProgramTimeoutError):
            processes.run(build_exit_argv(self._record.node, self._control_dir.name), timeout_s=5)
        self._control_dir.cleanup()
