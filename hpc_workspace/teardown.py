"""Ending processes for good, and the proof that none is left."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterable

from hpc_workspace import clock, procfs
from hpc_workspace.procfs import Process

# prctl(2), include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROBE_S = 0.01


def become_subreaper() -> None:
    """Let every orphan among our descendants become our child, so that none can hide under PID 1.

    The container's runtime starts a session of its own and leaves FUSE helpers behind: neither a process group nor a
    session finds them all; parenthood does. A child does not inherit this (prctl(2)).
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent(parent_pid: int, number: int) -> None:
    """Have the kernel send this process the signal `number` when its parent, `parent_pid`, dies."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:  # it died before we asked
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def reap_orphans(except_pid: int) -> None:
    """Collect dead children that nobody waits for; `except_pid` has its own waiter."""
    for process in procfs.descendants(os.getpid()):
        if process.is_zombie and process.parent_pid == os.getpid() and process.pid != except_pid:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def terminate(pid: int, *, grace_s: float) -> None:
    """Ask a child to end with TERM, and wait for that as long as `grace_s`."""
    process = procfs.read_process(pid)
    # One that was waited for already may have given its id to somebody else.
    if process is None or process.is_zombie or process.parent_pid != os.getpid():
        return
    send_signal(process, signal.SIGTERM)
    grace = clock.Deadline(grace_s)
    while _is_running(pid) and not grace.is_over:
        clock.sleep(_PROBE_S)


def end_all(
    find: Callable[[], Iterable[Process]], *, waited_for_pid: int = 0, looks: int = 2, timeout_s: float = 10.0
) -> tuple[list[Process], list[Process]]:
    """Kill whatever `find` finds, again and again, until `looks` looks in a row find nobody.

    Args:
        find: looks anew at each call; dead processes that are not reaped yet don't count.
        waited_for_pid: a child that somebody else here waits for.

    Returns: the processes that were ended, and those that are still there after `timeout_s`. An empty second list is
        the proof.
    """
    deadline = clock.Deadline(timeout_s)
    seen: dict[int, Process] = {}
    empty_looks = 0
    while True:
        found = [process for process in find() if not process.is_zombie]
        empty_looks = 0 if found else empty_looks + 1
        if empty_looks >= looks or deadline.is_over:
            gone = [process for process in seen.values() if process not in found]
            return gone, found
        for process in found:
            seen[process.pid] = process
            send_signal(process, signal.SIGKILL)
        reap_orphans(except_pid=waited_for_pid)
        clock.sleep(_PROBE_S)


def _is_running(pid: int) -> bool:
    process = procfs.read_process(pid)
    return process is not None and not process.is_zombie


def send_signal(process: Process, number: int) -> None:
    """Send `number` to `process` and to no later one with its id; nothing happens if it has ended, or is not ours."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:  # kernels before 5.3: the id, and the hope that it was not given away in this moment
        descriptor = -1
    try:
        now = procfs.read_process(process.pid)
        if now is None or now.start_ticks != process.start_ticks:
            return
        if descriptor >= 0:
            signal.pidfd_send_signal(descriptor, number)
        else:
            os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        if descriptor >= 0:
            os.close(descriptor)
