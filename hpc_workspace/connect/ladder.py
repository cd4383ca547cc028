"""Choosing a route: the one that is asked for, or with `auto` the first that reaches the door."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hpc_workspace.connect.loopback import LoopbackRoute
from hpc_workspace.connect.ssh_openssh import OpenSshRoute
from hpc_workspace.connect.ssh_paramiko import ParamikoRoute
from hpc_workspace.connect.streams import DoorStream, Route, open_door
from hpc_workspace.errors import TunnelError
from hpc_workspace.exchange import Wish
from hpc_workspace.record import Record

log = logging.getLogger(__name__)

_RUNGS: dict[str, Callable[[Record], Route]] = {
    "loopback": LoopbackRoute,
    "paramiko": ParamikoRoute,
    "openssh": OpenSshRoute,
}


def climb(connect: str, record: Record, token: str, wish: Wish) -> tuple[Route, DoorStream]:
    """The first route that reaches the door, and its first stream, with `wish` granted.

    Args:
        connect: a route's name, or `auto` for all in order.

    Raises:
        TunnelError: none does; the error lists every rung with its reason.
        ServerUnavailableError: the door was reached and refused the wish.
    """
    names = list(_RUNGS) if connect == "auto" else [connect]
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
            return route, stream
    if last is not None and len(names) == 1:
        raise last
    raise TunnelError(
        f"No route to the door of workspace {record.workspace_id} on {record.node}.",
        node=record.node,
        evidence="Tried, in order:\n" + "\n".join(reasons),
        remedy="Set connect= to a route that works on this site.",
    ) from last


def _first_stream(route: Route, record: Record, token: str, wish: Wish) -> DoorStream:
    """A granted stream over `route`; the route is closed if there is none."""
    try:
        stream = open_door(route, record.node, token, record.workspace_id, wish)
        stream.wait_granted()
    except BaseException:
        route.close()
        raise
    return stream
