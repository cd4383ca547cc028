"""What can happen to a node program: values, put into its one queue by whoever notices."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from hpc_workspace.processes import Child


@dataclass(frozen=True)
class Signalled:
    """This process got a signal that asks for the end, or (USR1) says that the time limit is near."""

    number: int


@dataclass(frozen=True)
class ServerDied:
    """The process `child`, a server, ended by itself."""

    child: Child
    returncode: int


@dataclass(frozen=True)
class LeasesChanged:
    """A client came or went; `count` leases are held now."""

    count: int


@dataclass(frozen=True)
class EndRequested:
    """A client asked for the end."""


@dataclass(frozen=True)
class DetachRequested:
    """A client wants the workspace to outlive it."""


@dataclass(frozen=True)
class Superseded:
    """The job runs elsewhere, in a later life: the controller had lost this node."""


@dataclass(frozen=True)
class LauncherGone:
    """The process that launched this one on the same machine is dead, or let go."""


class EndedEarly(Exception):
    """The end was asked for before the workspace was ready. The message says by whom.

    Args:
        by_client: and not by a signal, which may be that of a job that is requeued.
    """

    def __init__(self, reason: str, *, by_client: bool) -> None:
        super().__init__(reason)
        self.by_client = by_client


def require_no_end(event: object | None) -> None:
    """Before the workspace is ready: make sure that `event` does not ask for the end.

    Raises:
        EndedEarly: it does.
    """
    if isinstance(event, EndRequested):
        raise EndedEarly("ended by its client before it was ready", by_client=True)
    if isinstance(event, LauncherGone):
        raise EndedEarly("its client was gone before it was ready", by_client=True)
    if isinstance(event, Signalled) and event.number != signal.SIGUSR1:
        raise EndedEarly(f"{signal.Signals(event.number).name} before it was ready", by_client=False)
