"""End every process of a container, and prove that none is left."""

from __future__ import annotations

import ctypes
import os
import signal

from hpc_workspace import clock, procfs

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2), include/uapi/linux/prctl.h
_PROBE_S = 0.01
TAG_NAME = "HPC_WORKSPACE_SESSION"


def become_subreaper() -> None:
    """Let every orphan among our descendants become our child, so that none can hide under PID 1.

    The container's runtime starts a session of its own and leaves FUSE helpers behind: neither a process group nor a
    session finds them all; parenthood does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def reap_orphans(except_pid: int) -> None:
    """Collect dead children that nobody waits for; `except_pid` has its own waiter."""
    for process in procfs.descendants(os.getpid()):
        if process.is_zombie and process.parent_pid == os.getpid() and process.pid != except_pid:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def end_family(server_pid: int | None, tag: str, *, grace_s: float, timeout_s: float = 10.0) -> list[procfs.Process]:
    """End all descendants of this process, and all that carry `tag`.

    The server gets TERM and `grace_s`; then everything is killed until two looks in a row find nobody.

    Returns: the processes that are still there after `timeout_s`; empty is the proof.
    """
    deadline = clock.Deadline(timeout_s)
    if server_pid is not None and procfs.read_process(server_pid):
        _signal(server_pid, signal.SIGTERM)
        grace = clock.Deadline(grace_s)
        while _is_running(server_pid) and not grace.is_over:
            clock.sleep(_PROBE_S)
    empty_looks = 0
    while True:
        left = _family(tag)
        empty_looks = 0 if left else empty_looks + 1
        if empty_looks == 2 or deadline.is_over:
            return left
        for process in left:
            _signal(process.pid, signal.SIGKILL)
        reap_orphans(except_pid=server_pid or 0)
        clock.sleep(_PROBE_S)


def _family(tag: str) -> list[procfs.Process]:
    """Living processes of ours: descendants and tagged ones, ourselves aside. Zombies of the server don't count."""
    found = {process.pid: process for process in [*procfs.descendants(os.getpid()), *procfs.tagged(tag)]}
    return [process for process in found.values() if process.pid != os.getpid() and not process.is_zombie]


def _is_running(pid: int) -> bool:
    process = procfs.read_process(pid)
    return process is not None and not process.is_zombie


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
