"""What nobody gets below on this machine: a bare spawn, one raw request, bytes over plain TCP, a copy in the kernel."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from hpc_workspace import processes
from hpc_workspace.errors import PrerequisiteError

# OpenHands' server drops a connection that is idle for 5 s.
_IDLE_MAX_S = 2.0
_TIMEOUT_S = 60.0
_COPY_BYTES = 32 * 1024 * 1024


def timed_s(act: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def spawned_s(argv: Sequence[str]) -> float:
    """Seconds from the spawn of a program to its end, its output thrown away.

    Raises:
        OSError: it did not end with 0, or could not be started.
    """
    program = processes.find_program(argv[0])
    if program is None:
        raise PrerequisiteError(f"{argv[0]} is not available.")
    null = os.open(os.devnull, os.O_RDWR)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
        began_s = time.perf_counter()
        pid = os.posix_spawn(program, list(argv), os.environ, file_actions=actions)
        status = os.waitpid(pid, 0)[1]
        took_s = time.perf_counter() - began_s
    finally:
        os.close(null)
    if status:
        raise OSError(f"{' '.join(argv)} ended with {os.waitstatus_to_exitcode(status)}")
    return took_s


def at_once_per_s(act: Callable[[], object], *, count: int, at_once: int) -> float:
    """How many calls a second, `at_once` of them at a time, each in a thread."""
    with ThreadPoolExecutor(at_once) as pool:
        return count / timed_s(lambda: [*pool.map(lambda _: act(), range(count))])


class RawHttp:
    """One keep-alive connection, one prepared request: what HTTP costs when nothing is done for anybody.

    Args:
        connect: makes a connected socket.
    """

    def __init__(self, connect: Callable[[], socket.socket], path: str, body: dict[str, object], key: str) -> None:
        self._connect = connect
        payload = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Session-API-Key: {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        self._request = head.encode() + payload
        self._socket: socket.socket | None = None
        self._used_s = 0.0

    def post_s(self) -> float:
        """Seconds for the request and its whole answer; a connection that is idle for long is made anew before.

        Raises:
            OSError: the answer is not 200.
        """
        connection = self._fresh()
        began_s = time.perf_counter()
        connection.sendall(self._request)
        data = b""
        while not (end := _whole(data)):
            piece = connection.recv(65536)
            if not piece:
                raise OSError("the server has hung up")
            data += piece
        took_s = time.perf_counter() - began_s
        self._used_s = time.perf_counter()
        if not data.startswith(b"HTTP/1.1 200") or len(data) != end:
            raise OSError(f"the server has answered {data[:200]!r}")
        return took_s

    def _fresh(self) -> socket.socket:
        if self._socket is not None and time.perf_counter() - self._used_s > _IDLE_MAX_S:
            self.close()
        if self._socket is None:
            self._socket = self._connect()
            self._socket.settimeout(_TIMEOUT_S)
        return self._socket

    def close(self) -> None:
        """Close its connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _whole(data: bytes) -> int:
    """The length of the answer that `data` begins with, once it is there as a whole; else 0."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        return 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = len(head) + len(end) + int(line.partition(b":")[2])
            return length if len(data) >= length else 0
    raise OSError(f"the server has answered without a length: {head[:200]!r}")


def unix_socket(path: str) -> socket.socket:
    """A connection to a Unix socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    return connection


def tcp_socket(host: str, port: int) -> socket.socket:
    """A TCP connection that sends at once."""
    connection = socket.create_connection((host, port), timeout=_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def kernel_copy(source: str, target: str) -> None:
    """A copy that the kernel makes, and nothing beside."""
    with open(source, "rb") as from_file, open(target, "wb") as to_file:
        left = os.fstat(from_file.fileno()).st_size
        while left > 0:
            left -= os.copy_file_range(from_file.fileno(), to_file.fileno(), min(left, _COPY_BYTES))
