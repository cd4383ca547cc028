"""The end of a run by hand: no pilot works or waits any more, and whoever tops them up is told to stop."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_workspace import clock, files
from hpc_workspace.batch.arrays import local_name
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import PilotView, RunReader
from hpc_workspace.launch.slurm import cancel_jobs
from hpc_workspace.owner import Owner

# Longer than a pilot gives its attempts to close their workspaces.
_ENDING_S = 75.0
_JOBS_AT_ONCE = 500  # ids of one scancel: its arguments have a bound
_MARK = "cancelled"


@dataclass(frozen=True)
class Cancelled:
    """What was done.

    Attributes:
        jobs: of Slurm, cancelled.
        ended: pilots of this machine that were told to end, and did.
        left: pilots that may still work, each with the reason why they were not ended from here.
    """

    jobs: list[str]
    ended: list[str]
    left: dict[str, str]


def cancel(run: RunDir) -> Cancelled:
    """End all pilots of a run, running or queued. What they had begun is not lost: `resume` begins it anew.

    Raises:
        SchedulerUnavailableError: Slurm does not answer; its jobs may go on.
    """
    # First, so that nobody puts another pilot in the place of one that goes.
    files.write_whole(run.path / _MARK, secrets.token_hex(8).encode())
    jobs: list[str] = []
    # Twice: a submission that was on its way is there by then.
    for _ in range(2):
        new = [job for job in slurm_jobs(run) if job not in jobs]
        for start in range(0, len(new), _JOBS_AT_ONCE):
            cancel_jobs(new[start : start + _JOBS_AT_ONCE])
        jobs += new
    ended, left = end_local_pilots(run)
    return Cancelled(jobs, ended, left)


def cancellation(run: RunDir) -> str:
    """What changes when a run is cancelled; empty before the first time."""
    with contextlib.suppress(FileNotFoundError):
        return (run.path / _MARK).read_text()
    return ""


def slurm_jobs(run: RunDir) -> list[str]:
    """The jobs of all submissions whose pilots have not said that they end, in their order."""
    over: set[str] = set()
    jobs: dict[str, None] = {}
    for one in run.submissions():
        if one.get("kind") == "slurm":
            jobs |= dict.fromkeys(map(str, one["jobs"]))
    for name in run.pilots():
        job = str((run.read_about(name, "pilot") or {}).get("job", name))
        if job.startswith("local-"):
            continue
        jobs.setdefault(job)
        if run.read_about(name, "ended") is not None or run.read_about(name, "fate") is not None:
            over.add(job)
    return [job for job in jobs if job not in over]


def end_local_pilots(run: RunDir) -> tuple[list[str], dict[str, str]]:
    """Have this machine's pilots end in good order, and wait for it. A process is told only if it surely is the pilot.

    Returns:
        The names of those that ended; and of those that may still work, each with the reason.
    """
    told: set[str] = set()
    reader = RunReader(run)
    deadline = clock.Deadline(_ENDING_S)
    for pause_s in clock.pauses_s(0.05, 1.0):
        pilots = [pilot for pilot in reader.read().pilots.values() if _is_local(pilot)]
        alive = [pilot for pilot in pilots if not pilot.is_gone]
        for pilot in alive:
            if pilot.name not in told and _tell_end(pilot):
                told.add(pilot.name)
        ours = [pilot for pilot in alive if pilot.name in told]
        # One that has been begun and has not got round to saying so would work on unseen.
        unborn = _unborn(run, pilots)
        if (not ours and not unborn) or deadline.is_over:
            break
        clock.sleep(pause_s)
    left = {pilot.name: _why_left(pilot, pilot.name in told) for pilot in alive}
    left |= dict.fromkeys(unborn, "it has not begun to work yet")
    return sorted(told - set(left)), left


def _is_local(pilot: PilotView) -> bool:
    return str(pilot.about.get("job", "")).startswith("local-")


def _tell_end(pilot: PilotView) -> bool:
    owner = Owner.parse(str(pilot.about.get("owner", "")))
    if owner is None or owner.fate() != "alive":
        return False
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _why_left(pilot: PilotView, is_told: bool) -> str:
    if is_told:
        return f"it was told, and has not ended within {_ENDING_S:g} s"
    return f"it is on {pilot.about.get('node', 'another machine')}: run this there"


def _unborn(run: RunDir, pilots: Sequence[PilotView]) -> list[str]:
    """Jobs of this machine whose process runs for this very run, and that have no pilot yet."""
    begun = {str(pilot.about.get("job")) for pilot in pilots}
    here = local_name("")
    waiting = []
    for one in run.submissions():
        for job in map(str, one["jobs"] if one.get("kind") == "local" else ()):
            pid = job.removeprefix(here)
            if job not in begun and pid.isdigit() and _works_for(int(pid), run.path / "jobs"):
                waiting.append(job)
    return waiting


def _works_for(pid: int, folder: Path) -> bool:
    """Whether this process is submitit's for these jobs."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"submitit.local._local" in argv and os.fsencode(folder) in argv


__all__ = ["Cancelled", "cancel", "cancellation", "end_local_pilots", "slurm_jobs"]
