"""All workspaces of this user at a glance, from the shared directory alone: nobody is asked, nothing is waited for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from hpc_workspace import files, rendezvous
from hpc_workspace.errors import RendezvousError
from hpc_workspace.record import Record
from hpc_workspace.rendezvous import STALE_S, WorkspaceDirectory


@dataclass(frozen=True)
class Overview:
    """One workspace that has not said that it ended.

    Attributes:
        state: `waiting` (it has not published an address), `ready`, `silent` (no sign of life for two minutes: its node
            or its job is probably dead), `requeued` (its job may run again) or `unreadable`.
        node, runtime, job_id: None as long as nobody knows.
        age_s: since it was asked for.
        time_left_s: until its job's time limit; None: no limit is known.
        idle_s: since anybody was connected or a command ran, as of its last sign of life; None: nobody knows.
        notice: what is not as it should be, in words; empty if all is.
    """

    workspace_id: str
    state: str
    node: str | None = None
    runtime: str | None = None
    job_id: str | None = None
    age_s: float | None = None
    time_left_s: float | None = None
    idle_s: float | None = None
    notice: str = ""


def look() -> list[Overview]:
    """The workspaces of this user, in order of their ids.

    Raises:
        RendezvousError: the state directory can't be read.
    """
    found = (_look_at(directory) for directory in rendezvous.list_workspaces())
    return [overview for overview in found if overview is not None]


def _look_at(directory: WorkspaceDirectory) -> Overview | None:
    """None if it has ended for good."""
    try:
        age_s = files.age_s(directory.path / "spec.json")
        record = directory.read_record()
        if record is None:
            return Overview(directory.workspace_id, "waiting", age_s=age_s) if directory.has_token() else None
        if record.is_final and not (record.may_restart and record.failure is None and directory.has_token()):
            return None
        return _of_record(directory, record, age_s)
    except (RendezvousError, OSError) as error:
        with contextlib.suppress(OSError):
            if directory.path.is_dir():
                return Overview(directory.workspace_id, "unreadable", notice=str(error).splitlines()[0])
        return None


def _of_record(directory: WorkspaceDirectory, record: Record, age_s: float) -> Overview:
    beat_s = directory.heartbeat_age_s()
    is_silent = beat_s is None or abs(beat_s) > STALE_S
    state = "requeued" if record.is_final else "silent" if is_silent else record.state
    left_s = None
    if record.time_left_s is not None and not record.is_final:
        left_s = max(0.0, record.time_left_s - directory.record_age_s())
    return Overview(
        directory.workspace_id,
        state,
        node=record.node,
        runtime=record.runtime,
        job_id=record.job_id,
        age_s=age_s,
        time_left_s=left_s,
        idle_s=None if state != "ready" else directory.idle_s(),
        notice="" if state != "silent" else "no sign of life" + (f" for {beat_s:.0f} s" if beat_s is not None else ""),
    )
