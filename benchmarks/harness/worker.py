"""A process beside the harness that does what it is asked on stdin, a JSON object a line, and answers on stdout.

For what can't be measured in the harness's own process: OpenHands' client, which has an interpreter of its own; our
client on another node, or whose memory is looked at. What is timed is timed here, so that the asking costs nothing.
Keys come by stdin, never on argv. Needs no more than the standard library until it is asked for more.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PIECE_BYTES = 1024 * 1024
_ACCEPT_TIMEOUT_S = 30.0
_NONCE_BYTES = 32


class Worker:
    """What can be asked: each method is a `do`, its keywords are the rest of the object."""

    def __init__(self) -> None:
        self._workspace: Any = None
        self._listener: socket.socket | None = None
        self._nonce = b""

    def open_upstream(self, *, host: str, key: str) -> dict[str, Any]:
        """OpenHands' own client of a server at `host`."""
        from importlib.metadata import version

        from openhands.sdk.workspace import RemoteWorkspace

        self._workspace = RemoteWorkspace(host=host, api_key=key, working_dir="/tmp")  # noqa: S108 - inside
        return {"version": version("openhands-sdk")}

    def attach(self, *, id: str, connect: str) -> dict[str, Any]:
        """Our client of a running workspace."""
        from hpc_workspace import Workspace

        self._workspace = Workspace.attach(id, connect=connect)
        self._workspace.health()
        return {}

    def health(self, *, warm_ups: int = 0) -> dict[str, Any]:
        """One small request. Being asked leaves cold caches behind: `warm_ups` come right before it."""
        return _warm(self._workspace.health, warm_ups)

    def command(self, *, command: str, warm_ups: int = 0) -> dict[str, Any]:
        """One command to its end; as `health`."""
        return _warm(lambda: self._run(command), warm_ups)

    def commands(self, *, command: str, count: int, at_once: int) -> dict[str, Any]:
        """`count` commands, `at_once` of them at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            return {"took_s": _timed(lambda: [*pool.map(lambda _: self._run(command), range(count))])}

    def _run(self, command: str) -> None:
        result = self._workspace.execute_command(command)
        if result.exit_code != 0:
            raise OSError(f"{command!r} ended with {result.exit_code}: {result.stderr}")

    def upload(self, *, source: str, destination: str) -> dict[str, Any]:
        """A file into the workspace, and how much memory that took beyond what was in use."""
        return _watched(lambda: self._moved(self._workspace.file_upload(source, destination)))

    def download(self, *, source: str, destination: str) -> dict[str, Any]:
        """A file out of the workspace, and how much memory that took beyond what was in use."""
        return _watched(lambda: self._moved(self._workspace.file_download(source, destination)))

    def _moved(self, result: Any) -> None:
        if not result.success:
            raise OSError(f"not moved: {result.error}")

    def read(self, *, source: str) -> dict[str, Any]:
        """A file read in pieces and thrown away: the least that anything does with it."""

        def act() -> None:
            with open(source, "rb", buffering=0) as file:
                while file.read(_PIECE_BYTES):
                    pass

        return _watched(act)

    def start(self, *, image: str) -> dict[str, Any]:
        """A workspace's start and its end."""
        from benchmarks.start import whole_start_s

        start_s, close_s = whole_start_s(image)
        return {"start_s": start_s, "close_s": close_s}

    def bare_start(self, *, image: str) -> dict[str, Any]:
        """The container with its server alone, from its spawn to the first answer."""
        from benchmarks.start import bare_start_s
        from hpc_workspace import teardown

        teardown.become_subreaper()
        return {"took_s": bare_start_s(image)}

    def listen(self, *, address: str) -> dict[str, Any]:
        """A TCP port for one connection, which is to begin with the nonce told here."""
        self._listener = socket.create_server((address, 0))
        self._listener.settimeout(_ACCEPT_TIMEOUT_S)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        return {"port": self._listener.getsockname()[1], "nonce": self._nonce.hex()}

    def _accept(self) -> socket.socket:
        assert self._listener is not None
        with self._listener:
            connection = self._listener.accept()[0]
        connection.settimeout(_ACCEPT_TIMEOUT_S)
        if not hmac.compare_digest(connection.recv(_NONCE_BYTES, socket.MSG_WAITALL), self._nonce):
            connection.close()
            raise OSError("a stranger has connected")
        return connection

    def receive(self, *, path: str) -> dict[str, Any]:
        """Write what comes through the port to a file; one byte back when all of it has come."""
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with self._accept() as connection, open(path, "wb", buffering=0) as file:
            while count := connection.recv_into(buffer):
                file.write(buffer[:count])
            connection.sendall(b".")
        return {}

    def send(self, *, path: str) -> dict[str, Any]:
        """Send a file through the port."""
        with self._accept() as connection, open(path, "rb") as file:
            connection.sendfile(file)
        return {}

    def make_file(self, *, path: str, mib: int) -> dict[str, Any]:
        """A file that nothing can compress."""
        make_file(Path(path), mib)
        return {}

    def remove(self, *, path: str) -> dict[str, Any]:
        """Remove a file that may be there. What was not yet on the disk need not get there any more."""
        Path(path).unlink(missing_ok=True)
        return {}

    def make_directory(self, *, path: str) -> dict[str, Any]:
        """A private directory for this run's files, which this process removes at its end."""
        Path(path).mkdir(mode=0o700)
        self._directory = path
        return {}

    def close(self) -> None:
        """Let go of everything."""
        if hasattr(self._workspace, "disconnect"):
            self._workspace.disconnect()
        if directory := getattr(self, "_directory", None):
            shutil.rmtree(directory, ignore_errors=True)


def make_file(path: Path, mib: int) -> None:
    """A file of so many MiB that nothing can compress; one that is there stays."""
    if path.exists():
        return
    block = os.urandom(16 * _PIECE_BYTES)
    with path.open("wb") as file:
        for start in range(0, mib, 16):
            file.write(block[: (mib - start) * _PIECE_BYTES])


def _warm(act: Callable[[], object], warm_ups: int) -> dict[str, Any]:
    for _ in range(warm_ups):
        act()
    return {"took_s": _timed(act)}


def _timed(act: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def _watched(act: Callable[[], object]) -> dict[str, Any]:
    """How long it took, and how far this process's resident memory went beyond what it had (bytes)."""
    # proc(5): 5 sets the peak, VmHWM, back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    took_s = _timed(act)
    return {"took_s": took_s, "extra_bytes": max(0, _resident_bytes("VmHWM") - before)}


def _resident_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def main() -> None:
    """Answer until stdin ends. What is printed by libraries goes to stderr, so that it is no answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            do = asked.pop("do")
            try:
                answer = getattr(worker, do)(**asked)
            except Exception as error:  # noqa: BLE001 - told to the one who asked, who decides
                answer = {"error": f"{do}: {type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
    finally:
        worker.close()


if __name__ == "__main__":
    main()
