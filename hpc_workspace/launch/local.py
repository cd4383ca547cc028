"""The node program as a process of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from hpc_workspace import clock, processes
from hpc_workspace.errors import ContainerError, RendezvousError, WorkspaceError
from hpc_workspace.owner import Owner
from hpc_workspace.record import Record
from hpc_workspace.rendezvous import WorkspaceDirectory

_LOOK_S = 0.01
_REAP_TIMEOUT_S = 15.0
_LAST_WORD_S = 1.0


def build_argv(directory: WorkspaceDirectory) -> list[str]:
    """The argv of the node program for `directory`, here."""
    return [sys.executable, "-m", "hpc_workspace.node", str(directory.path)]


def launch(directory: WorkspaceDirectory) -> LocalLaunched:
    """Start the node program for `directory`; its log is node.log."""
    with directory.node_log.open("ab") as log:
        child = processes.spawn(
            build_argv(directory), output=log, env=_environment(), cwd=str(directory.path), lifeline=True
        )
    return LocalLaunched(directory, child)


def _environment() -> dict[str, str]:
    """This process's environment, in which the interpreter's import path is absolute: the child has another cwd."""
    environment = dict(os.environ)
    if "PYTHONPATH" in environment:
        paths = [os.path.abspath(path or ".") for path in environment["PYTHONPATH"].split(os.pathsep)]  # noqa: PTH100 - relative to this process, before the child has another cwd
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


class LocalLaunched:
    """A node program that this process started."""

    job_id: str | None = None

    def __init__(self, directory: WorkspaceDirectory, child: processes.Child) -> None:
        self._directory = directory
        self._child = child

    def find_end(self) -> WorkspaceError | None:
        returncode = self._child.returncode()
        if returncode is None:
            return None
        return ContainerError(
            f"The node program of workspace {self._directory.workspace_id} ended with exit code {returncode}.",
            evidence=f"Last lines of {self._directory.node_log}:\n{self._directory.log_tail(self._directory.node_log)}",
        )

    def is_pending(self) -> bool:
        return False

    def note_ready(self, node: str) -> None:
        """Nothing: an end is called the same before and after."""

    def has_left(self, node: str) -> bool:
        return False

    def has_ending_neighbour(self, node: str) -> bool:
        return False

    def end(self) -> None:
        self._child.send_signal(signal.SIGTERM)

    def wait_gone(self, timeout_s: float) -> bool:
        returncode = self._child.wait(timeout_s)
        if returncode is not None and returncode < 0:
            _reap(self._directory)
        return returncode is not None

    def describe(self) -> str:
        return f"starting on this machine (process {self._child.pid})"


def _reap(directory: WorkspaceDirectory) -> None:
    """Clear away what a node program left whose two processes were both killed; its log says what was done.

    If only the warden was, the node program is about to end by itself, and to say so in the record.
    """
    with contextlib.suppress(RendezvousError):
        if directory.wait_record(lambda record: record.is_final, timeout_s=_LAST_WORD_S) is not None:
            return
    with directory.node_log.open("ab") as log:
        log.write(b"the node program was killed: reaping\n")
        argv = [sys.executable, "-m", "hpc_workspace.node.reap"]
        processes.spawn(argv, output=log, env=_environment(), cwd="/").wait(_REAP_TIMEOUT_S)


class LocalAttached:
    """A node program of this machine that another process started, known by its record."""

    job_id: str | None = None

    def __init__(self, record: Record) -> None:
        self._record = record
        self._owner = Owner.parse(record.owner)

    def _is_running(self) -> bool:
        return self._owner is not None and self._owner.fate() != "dead"

    def find_end(self) -> WorkspaceError | None:
        if self._is_running():
            return None
        return ContainerError(f"The node program of workspace {self._record.workspace_id} has ended.")

    def is_pending(self) -> bool:
        return False

    def note_ready(self, node: str) -> None:
        """Nothing: an end is called the same before and after."""

    def has_left(self, node: str) -> bool:
        return False

    def has_ending_neighbour(self, node: str) -> bool:
        return False

    def end(self) -> None:
        """Nothing: a process that this one did not start is ended through its door, never by its number."""

    def wait_gone(self, timeout_s: float) -> bool:
        deadline = clock.Deadline(timeout_s)
        while self._is_running():
            if deadline.is_over:
                return False
            clock.sleep(_LOOK_S)
        return True

    def describe(self) -> str:
        return f"running on {self._record.node}"
