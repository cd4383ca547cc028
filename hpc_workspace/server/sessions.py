"""Ending everything that a command started: its session, found in /proc.

A process group is not enough: a shell with job control, or a tool that calls setpgid, leaves it. What calls setsid
has left the session too, and is the node's to end.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

_POLL_S = 0.05


def session_members(sessions: Iterable[int]) -> set[int]:
    """Pids of live processes (zombies excepted) in any of the given sessions; empty where there is no /proc.

    Source: proc(5), /proc/pid/stat: the fields after the last ")" are state, ppid, pgrp, session.
    """
    wanted = {str(session).encode() for session in sessions}
    members = set()
    try:
        entries = [name for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return set()
    for name in entries:
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes()
        except OSError:  # it ended between listing and reading
            continue
        state, _, _, session = stat.rpartition(b")")[2].split(maxsplit=4)[:4]
        if session in wanted and state not in (b"Z", b"X"):
            members.add(int(name))
    return members


def signal_session(session: int, number: signal.Signals) -> int:
    """Signal the leader's process group, then every other member; returns how many members were seen alive."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, number)
    leader_group, members = session, session_members([session])
    for pid in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(pid) != leader_group:
                os.kill(pid, number)
    return len(members)


async def _has_members(session: int) -> bool:
    return bool(await asyncio.to_thread(session_members, [session]))


async def end_session(session: int, *, grace_s: float) -> None:
    """TERM, time to clean up, then KILL, until no member is left or KILL has been sent for half a second.

    The leader must not have been reaped yet: while it is a zombie, its number can't name a stranger's session.
    """
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(signal_session, session, signal.SIGTERM)
    deadline = loop.time() + grace_s
    while loop.time() < deadline and await _has_members(session):
        await asyncio.sleep(min(_POLL_S, grace_s / 4))
    deadline = loop.time() + 0.5
    while await asyncio.to_thread(signal_session, session, signal.SIGKILL) and loop.time() < deadline:
        await asyncio.sleep(0.01)
