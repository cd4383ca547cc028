"""A batch at one moment, as people want it: how far, what fails, which pilots work or wait, which tasks take long."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hpc_workspace import clock
from hpc_workspace.batch.outcomes import INFRA_CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_workspace.batch.outcomes import AttemptRecord
    from hpc_workspace.batch.run_dir import RunDir
    from hpc_workspace.batch.state import PilotView, RunState
    from hpc_workspace.launch.slurm_commands import JobStatus

_ASK_SLURM_S = 10.0
_NAMED = 5  # slowest and latest tasks
_LATEST_OF_PACE = 200


@dataclass(frozen=True)
class PilotLine:
    """One pilot, or a job that is to become one.

    Attributes:
        state: `running`, `queued`, `ended`, or Slurm's word for the end of its job.
        busy: how many of its slots have a task now.
        since_s: seconds since it began; None if it has not.
        why: of a queued one Slurm's reason, in English where there is any; of one that has ended its last word.
    """

    name: str
    job: str
    state: str
    node: str = ""
    slots: int = 0
    busy: int = 0
    since_s: float | None = None
    why: str = ""


@dataclass(frozen=True)
class TaskLine:
    """One attempt: under way (`state` is `running`), or how it ended (`done`, or its failure class)."""

    task: str
    attempt: int
    state: str
    seconds: float
    node: str = ""


@dataclass(frozen=True)
class Overview:
    """A run at one moment.

    Attributes:
        counts: tasks by where they stand: waiting, running, retry, done, failed.
        failures: tasks that stay failed, by class.
        lost: attempts that were lost to the infrastructure, by class; most were made good by another.
        left_s: about how long it will take yet; None where nothing says so.
        slowest: under way, longest first. latest: that ended, last first.
        notice: something to know, such as that Slurm does not answer; empty if there is nothing.
    """

    tasks: int
    counts: Mapping[str, int]
    failures: Mapping[str, int]
    lost: Mapping[str, int]
    left_s: float | None
    pilots: list[PilotLine] = field(default_factory=list)
    slowest: list[TaskLine] = field(default_factory=list)
    latest: list[TaskLine] = field(default_factory=list)
    notice: str = ""

    @property
    def finished(self) -> int:
        return self.counts["done"] + self.counts["failed"]

    @property
    def open_tasks(self) -> int:
        return self.tasks - self.finished


class Looker:
    """Makes overviews of one run, one after the other.

    Args:
        is_coordinated: who looks has pilots submitted where they are missing.
    """

    def __init__(self, run: RunDir, *, is_coordinated: bool = False) -> None:
        self._run = run
        self._is_coordinated = is_coordinated
        self._begun_at: dict[tuple[str, int], float] = {}
        self._submitted: dict[str, None] = {}
        self._submissions_read: clock.Deadline | None = None

    def look(self, state: RunState) -> Overview:
        """The overview of this state. Asks Slurm, at most every 10 s, if it has any of the jobs."""
        counts = Counter(standing.state for standing in state.standings.values())
        failed = [one.attempt for one in state.standings.values() if one.state == "failed" and one.attempt]
        every = [one for attempts in state.attempts.values() for one in attempts]
        records = [one.record for one in every if one.record is not None]
        records.sort(key=_ended_at, reverse=True)
        pilots, notice = self._pilots(state)
        slots = sum(pilot.slots for pilot in pilots if pilot.state == "running")
        tasks_open = len(state.standings) - counts["done"] - counts["failed"]
        is_idle = not notice and not any(pilot.state in ("running", "queued") for pilot in pilots)
        if tasks_open and is_idle and not self._is_coordinated:
            notice = f"No pilot works on it; `hpc-workspace batch resume {self._run.path}` goes on."
        return Overview(
            tasks=len(state.standings),
            counts={name: counts[name] for name in ("waiting", "running", "retry", "done", "failed")},
            failures=dict(Counter(one.failure_class or "lost" for one in failed)),
            lost=dict(Counter(one.failure_class for one in every if one.failure_class in INFRA_CLASSES)),
            left_s=_left_s(tasks_open, counts["running"], records, slots),
            pilots=pilots,
            slowest=self._slowest(state),
            latest=[_as_line(record) for record in records[:_NAMED]],
            notice=notice,
        )

    def _slowest(self, state: RunState) -> list[TaskLine]:
        now_s = clock.wall_s()
        lines = []
        for name, standing in state.standings.items():
            attempt = standing.attempt
            if standing.state != "running" or attempt is None:
                continue
            seconds = max(0.0, now_s - self._began_at(name, attempt.number, now_s))
            pilot = state.pilots.get(attempt.pilot)
            node = str(pilot.about.get("node", "")) if pilot is not None else ""
            lines.append(TaskLine(name, attempt.number, "running", round(seconds, 1), node))
        return sorted(lines, key=lambda line: -line.seconds)[:_NAMED]

    def _began_at(self, task_id: str, number: int, now_s: float) -> float:
        """When the attempt was claimed."""
        key = (task_id, number)
        if key not in self._begun_at:
            self._begun_at[key] = self._run.claimed_at_s(task_id, number) or now_s
        return self._begun_at[key]

    def _pilots(self, state: RunState) -> tuple[list[PilotLine], str]:
        """The pilots that work, those that wait, those that are gone; and a notice."""
        busy = Counter(
            one.attempt.pilot for one in state.standings.values() if one.state == "running" and one.attempt is not None
        )
        begun = {pilot.job for pilot in state.pilots.values()}
        slurm = _Slurm()
        lines = [_pilot_line(pilot, busy[pilot.name], slurm) for pilot in state.pilots.values()]
        for job in self._jobs():
            if job not in begun and not job.startswith("local-") and (waiting := slurm.waiting(job)) is not None:
                lines.append(PilotLine(job, job, "queued", why=waiting))
        order = {"running": 0, "queued": 1}
        lines.sort(key=lambda line: (order.get(line.state, 2), line.since_s or 0.0))
        return lines, slurm.notice

    def _jobs(self) -> dict[str, None]:
        if self._submissions_read is None or self._submissions_read.is_over:
            self._submissions_read = clock.Deadline(5.0)
            for one in self._run.submissions():
                self._submitted |= dict.fromkeys(map(str, one["jobs"]))
        return self._submitted


class _Slurm:
    """What Slurm says of jobs, until it does not answer."""

    def __init__(self) -> None:
        self.notice = ""

    def end_of(self, job: str) -> str:
        """Slurm's word for how a job ended; empty if it has not, or nobody knows."""
        status = self._status(job)
        return status.state if status is not None and status.is_final else ""

    def waiting(self, job: str) -> str | None:
        """Why a job that has not begun as a pilot waits; None if it does not."""
        from hpc_workspace.launch.reasons import explain_pending

        if (status := self._status(job)) is None:
            # Just submitted, or forgotten by Slurm; without an answer it is not known to be gone.
            return "Slurm does not answer" if self.notice else None
        if status.is_final:
            return None
        if status.state != "PENDING":
            return status.state.lower()
        if status.reason == "None":
            return ""  # Slurm has not looked at it yet
        text = explain_pending(status.reason).text
        return f"{text} ({status.reason})" if text else status.reason

    def _status(self, job: str) -> JobStatus | None:
        from hpc_workspace.errors import PrerequisiteError, SchedulerUnavailableError
        from hpc_workspace.launch.slurm import view

        if self.notice:
            return None
        try:
            return view.status(job, max_age_s=_ASK_SLURM_S)
        except (SchedulerUnavailableError, PrerequisiteError) as error:
            self.notice = f"Slurm does not answer: {error.what}"
            return None


def _pilot_line(pilot: PilotView, busy: int, slurm: _Slurm) -> PilotLine:
    about = pilot.about
    job = pilot.job
    state, why = "running", ""
    if pilot.ended is not None:
        state, why = "ended", str(pilot.ended.get("why", ""))
    elif pilot.fate is not None:
        state = str(pilot.fate.get("state") or "lost").lower()
    elif pilot.is_gone:
        state = "lost"
    elif not job.startswith("local-") and (word := slurm.end_of(job)):
        state = word.lower()
    started = about.get("started_at")
    since_s = None if started is None else round(max(0.0, clock.wall_s() - float(started)), 1)
    slots = int(about.get("slots", 0))
    return PilotLine(pilot.name, job, state, str(about.get("node", "")), slots, busy, since_s, why)


def _ended_at(record: AttemptRecord) -> float:
    return record.started_at + record.duration_s


def _as_line(record: AttemptRecord) -> TaskLine:
    state = record.failure_class or "done"
    return TaskLine(record.task, record.attempt, state, round(record.duration_s, 1), record.node)


def _left_s(tasks_open: int, running: int, records: list[AttemptRecord], slots: int) -> float | None:
    """How long at the pace of the latest attempts: as if those under way were half done."""
    if not tasks_open:
        return 0.0
    if not records or not slots:
        return None
    each_s = statistics.fmean(record.duration_s for record in records[:_LATEST_OF_PACE])
    # The last one takes its time whatever there is of slots.
    return max(each_s / 2, each_s * (tasks_open - running / 2) / min(slots, tasks_open))


__all__ = ["Looker", "Overview", "PilotLine", "TaskLine"]
