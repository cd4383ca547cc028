"""Choosing a route: the one that is asked for, or with `auto` the first that reaches the door."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from hpc_workspace import files
from hpc_workspace.connect.loopback import LoopbackRoute
from hpc_workspace.connect.multiplexed import SrunRoute, SshCommandRoute
from hpc_workspace.connect.ssh_openssh import OpenSshRoute
from hpc_workspace.connect.ssh_paramiko import ParamikoRoute
from hpc_workspace.connect.streams import DoorStream, Route, open_door
from hpc_workspace.errors import TunnelError
from hpc_workspace.exchange import Wish
from hpc_workspace.record import Record
from hpc_workspace.rendezvous import state_dir

log = logging.getLogger(__name__)

# Nothing is lost by looking whether the node is this machine.
_ALWAYS_FIRST = "loopback"

_RUNGS: dict[str, Callable[[Record], Route]] = {
    "loopback": LoopbackRoute,
    "paramiko": ParamikoRoute,
    "openssh": OpenSshRoute,
    "srun": SrunRoute,
    "ssh-command": SshCommandRoute,
}


def climb(connect: str, record: Record, token: str, wish: Wish) -> tuple[Route, DoorStream]:
    """The first route that reaches the door, and its first stream, with `wish` granted.

    Args:
        connect: a route's name, or `auto` for all in order.

    Raises:
        TunnelError: none does; the error lists every rung with its reason.
        ServerUnavailableError: the door was reached and refused the wish.
    """
    names = _in_order() if connect == "auto" else [connect]
    reasons: list[str] = []
    last: TunnelError | None = None
    for name in names:
        try:
            route = _RUNGS[name](record)
            stream = _first_stream(route, record, token, wish)
        except TunnelError as error:
            reasons.append(f"  {name}: {error.what} {error.evidence} {error.remedy}".rstrip())
            last = error
        else:
            log.info("workspace %s on %s: connected by %s", record.workspace_id, record.node, name)
            if connect == "auto" and name != _ALWAYS_FIRST:
                _remember(name)
            return route, stream
    if last is not None and len(names) == 1:
        raise last
    raise TunnelError(
        f"No route to the door of workspace {record.workspace_id} on {record.node}.",
        node=record.node,
        evidence="Tried, in order:\n" + "\n".join(reasons),
        remedy="Set connect= to a route that works on this site.",
    ) from last


def _in_order() -> list[str]:
    """All routes, the one that worked from this machine last time before the others: it will again."""
    last = ""
    with contextlib.suppress(OSError):
        last = _memory().read_text(errors="replace").strip()
    first = [_ALWAYS_FIRST, *([last] if last in _RUNGS and last != _ALWAYS_FIRST else [])]
    return [*first, *(name for name in _RUNGS if name not in first)]


def _remember(name: str) -> None:
    with contextlib.suppress(OSError):
        if not _memory().exists() or _memory().read_text(errors="replace").strip() != name:
            files.write_whole(_memory(), name.encode())


def _memory() -> Path:
    """Where the winner is kept: beside the workspaces, which are a site's, one for each machine."""
    return state_dir() / f"route-{socket.gethostname().partition('.')[0]}"


def _first_stream(route: Route, record: Record, token: str, wish: Wish) -> DoorStream:
    """A granted stream over `route`; the route is closed if there is none."""
    try:
        stream = open_door(route, record.node, token, record.workspace_id, wish)
        stream.wait_granted()
    except BaseException:
        route.close()
        raise
    return stream
