"""One cgroup (v1) a node in each controller that Slurm divides; the node's cgroup namespace has it as its root.

Slurm's v2 plugin refuses a hybrid host (seen with 24.11.5), so v1 is used where the host mounts it, each controller by
itself. On any other host there are no cgroups: Slurm tracks processes with linuxproc and memory limits do not kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from .base import ClusterError, State

MOUNT = Path("/sys/fs/cgroup")
WANTED = ("freezer", "memory", "cpuset", "cpu", "cpuacct", "devices")


def controllers() -> tuple[str, ...]:
    """The controllers that nodes get: all of `WANTED`, or none where the host does not mount them as v1."""
    present = all((MOUNT / name / "cgroup.procs").exists() and not (MOUNT / name).is_symlink() for name in WANTED)
    return WANTED if present else ()


def _make(path: Path, controller: str) -> None:
    path.mkdir(exist_ok=True)
    if controller == "cpuset":
        # A new cpuset is empty, and nothing can join an empty one: copy down. Source: cpuset(7).
        for name in ("cpuset.cpus", "cpuset.mems"):
            (path / name).write_text((path.parent / name).read_text())
        (path / "cgroup.clone_children").write_text("1")


def make_node_cgroups(state: State, node: str) -> None:
    """Make the node's cgroup in each controller, with a child `init` in which its processes live."""
    for controller in controllers():
        path = MOUNT / controller
        for part in (state.tag, node, "init"):
            path /= part
            _make(path, controller)


def procs_files(state: State, node: str, child: str = "init") -> list[str]:
    """The files that a process writes "0" to, to join the node's cgroups."""
    return [str(MOUNT / name / state.tag / node / child / "cgroup.procs") for name in controllers()]


def leave_node_cgroups(state: State, pid: int) -> None:
    """Move a process of the host out of a node's cgroups, to the cluster's."""
    for controller in controllers():
        (MOUNT / controller / state.tag / "cgroup.procs").write_text(str(pid))


def _pids(top: Path) -> set[int]:
    found: set[int] = set()
    for directory, _, _ in os.walk(top):
        with contextlib.suppress(OSError):
            found.update(int(word) for word in (Path(directory) / "cgroup.procs").read_text().split())
    return found - {0}


def node_pids(state: State, node: str) -> set[int]:
    """The host's ids of all processes in the node's cgroups."""
    return set().union(*(_pids(MOUNT / name / state.tag / node) for name in controllers())) if controllers() else set()


def kill_all(state: State, node: str, *, timeout_s: float = 15.0) -> None:
    """Kill what is left in the node's cgroups until nothing is.

    Raises:
        ClusterError: something outlived SIGKILL for `timeout_s`.
    """
    for name in controllers():
        for frozen in (MOUNT / name / state.tag / node).rglob("freezer.state"):
            with contextlib.suppress(OSError):
                frozen.write_text("THAWED")
    deadline = time.monotonic() + timeout_s
    while pids := node_pids(state, node):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ClusterError(f"processes of {node} outlived SIGKILL: {sorted(pids)}")
        time.sleep(0.02)


def remove_cgroups(state: State, node: str | None = None) -> None:
    """Remove the node's cgroups, children first, or (without `node`) the whole cluster's."""
    for name in controllers():
        top = MOUNT / name / state.tag
        for directory, _, _ in os.walk(top / node if node else top, topdown=False):
            for attempt in range(50):
                try:
                    Path(directory).rmdir()
                    break
                except OSError:
                    if attempt == 49:
                        raise
                    time.sleep(0.02)  # the kernel lets go of a dead process's cgroup a moment later
