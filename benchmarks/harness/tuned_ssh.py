"""The tunnel that an expert would make by hand: the system's `ssh -L`, tuned so that nothing waits for Nagle."""

from __future__ import annotations

import select
import subprocess
from pathlib import Path

from benchmarks.harness.floors import unix_socket
from hpc_workspace.client import AgentServerClient, AtOnce
from hpc_workspace.connect.streams import SocketStream
from hpc_workspace.record import Record

_READY_TIMEOUT_S = 20.0


class TunedForward:
    """A forward past the door, and our HTTP client over it: the route alone is what is different.

    sshd sets TCP_NODELAY on its connection only once a session channel has run something (OpenSSH 10.0): so it is not
    `ssh -N`, but one whose session runs `cat` for as long as we hold its stdin. And on a port that is forwarded to a
    Unix socket, `ssh` leaves Nagle on, which costs 40 ms a request (seen): so its end here is a Unix socket too.

    Args:
        directory: 0700, for that socket.

    Raises:
        OSError: it does not come up.
    """

    def __init__(self, record: Record, server_socket: str, key: str, directory: Path) -> None:
        here = str(directory / "ssh.sock")
        options = ["-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "ControlPath=none"]
        argv = ["ssh", *options, "-L", f"{here}:{server_socket}", record.node, "cat"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.client = AgentServerClient(
            AtOnce(lambda _: SocketStream(unix_socket(here))),
            api_key=key,
            server=record.server,
            working_dir=record.working_dir,
        )
        self._wait_ready()

    def _wait_ready(self) -> None:
        """Until what its session runs gives a line back: the forward was set up before that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        is_ready, _, _ = select.select([self._process.stdout], [], [], _READY_TIMEOUT_S)
        if not is_ready or self._process.stdout.readline() != b"\n":
            self.close()
            raise OSError(f"ssh -L does not come up ({self._process.returncode})")

    def close(self) -> None:
        """End it, by the end of its session's stdin."""
        self.client.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
