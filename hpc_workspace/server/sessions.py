"""Ending everything that a command started: found in /proc by its session, its mark and its parents.

A process group is not enough: a shell with job control, or a tool that calls setpgid, leaves it; what calls setsid
leaves the session too. So each command has a mark in its environment, which all that it starts inherits. Out of reach
is only what has all three: a session of its own, an environment without the mark (`env -i`), and a parent that is gone.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MARK_NAME = "HPC_WORKSPACE_COMMAND"
_POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """A live process: its id, and the clock tick at which it began (an id alone is given out again)."""

    pid: int
    began: int


@dataclass
class Family:
    """What one command started.

    Attributes:
        session: the leader's process id.
        mark: the value of `MARK_NAME` in its environment; None: it has none.
    """

    session: int
    mark: str | None = None
    # Whoever was seen once stays a member, though its parent is gone.
    _seen: set[Process] = field(default_factory=set)

    def members(self) -> set[int]:
        """Pids of live processes (zombies excepted); empty where there is no /proc."""
        parents = {}
        found = set()
        marked = None if self.mark is None else f"\0{MARK_NAME}={self.mark}\0".encode()
        alive = _processes()
        for process, (parent, session) in alive.items():
            parents[process.pid] = parent
            if (
                session == self.session
                or process in self._seen
                or (marked is not None and marked in b"\0" + _environment(process.pid))
            ):
                found.add(process.pid)
        found |= _descendants(found, parents)
        self._seen |= {process for process in alive if process.pid in found}
        return found

    def signal(self, number: signal.Signals) -> int:
        """Signal the leader's process group and every other member; returns how many members were seen alive."""
        members = self.members()  # before the first of them dies, and its children have another parent
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.session, number)
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) != self.session:
                    os.kill(pid, number)
        return len(members)


def _processes() -> dict[Process, tuple[int, int]]:
    """Parent and session of every live process.

    Source: proc(5), /proc/pid/stat: the fields after the last ")" are state, ppid, pgrp, session; the 20th is the time
    of the start.
    """
    found = {}
    try:
        entries = [name for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return {}
    for name in entries:
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes()
        except OSError:  # it ended between listing and reading
            continue
        fields = stat.rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):
            found[Process(int(name), int(fields[19]))] = (int(fields[1]), int(fields[3]))
    return found


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it ended, or is somebody else's
        return b""


def _descendants(ancestors: set[int], parents: Mapping[int, int]) -> set[int]:
    """Children of `ancestors`, their children, and so on."""
    found: set[int] = set()
    new = ancestors
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found - ancestors
        found |= new
    return found


async def end_family(family: Family, *, grace_s: float) -> None:
    """TERM, time to clean up, then KILL, until no member is left or KILL has been sent for half a second.

    The leader must not have been reaped yet: while it is a zombie, its number can't name a stranger's session.
    """
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(family.signal, signal.SIGTERM)
    deadline = loop.time() + grace_s
    while loop.time() < deadline and await asyncio.to_thread(lambda: bool(family.members())):
        await asyncio.sleep(min(_POLL_S, grace_s / 4))
    deadline = loop.time() + 0.5
    while await asyncio.to_thread(family.signal, signal.SIGKILL) and loop.time() < deadline:
        await asyncio.sleep(0.01)
