"""Whoever watches a run: has pilots submitted while there is work, and says what became of those that are gone.

The pilots need nobody: a run goes on without its coordinator, but for pilots that have ended too early. Several at once
do no harm beyond a pilot too many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hpc_workspace import clock
from hpc_workspace.batch.arrays import Submitted, submit_pilots
from hpc_workspace.batch.outcomes import class_of_state
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import PilotView, RunReader, RunState
from hpc_workspace.batch.supervisor import HEARTBEAT_S, Pilot
from hpc_workspace.errors import JobEndedError, SchedulerUnavailableError
from hpc_workspace.launch.slurm import cancel_jobs, view
from hpc_workspace.options import SlurmOptions

log = logging.getLogger(__name__)

# A pilot that nobody knows anything of is given up after so many heartbeats did not come.
_STALE_S = 12 * HEARTBEAT_S
_LOOK_S = (0.1, 5.0)
_ASK_SLURM_S = 10.0
# Pilots that end one after the other and never claim anything do not get better.
_BARREN_MAX = 3
_GOODBYE_S = 120.0
_APPEARS_S = 30.0


@dataclass(frozen=True)
class Wanted:
    """How the run is to be worked on.

    Attributes:
        pilots: how many at once.
        array_max: the longest array that Slurm takes (slurm.conf's MaxArraySize); None: there is no bound.
        one_job_per_task: each pilot ends after one task.
    """

    pilots: int
    slurm: SlurmOptions | None
    array_max: int | None = None
    one_job_per_task: bool = False


class Coordinator:
    """Brings a run to its end.

    Args:
        say: told what happens, in words.
        on_state: given every state that is seen.
    """

    def __init__(
        self,
        run: RunDir,
        pilot: Pilot,
        wanted: Wanted,
        *,
        say: Callable[[str], None] = log.info,
        on_state: Callable[[RunState], None] = lambda state: None,
    ) -> None:
        self._run = run
        self._pilot = pilot
        self._wanted = wanted
        self._say = say
        self._on_state = on_state
        self._reader = RunReader(run)
        self._submitted: dict[str, Submitted] = {}
        self._submitted_s: dict[str, float] = {}
        self._jobs = {str(job) for one in run.submissions() for job in one["jobs"]}
        self._barren = 0
        self._ended: set[str] = set()

    def finish(self) -> RunState:
        """Until every task stands where it stays.

        Raises:
            JobEndedError: pilots end without doing anything.
            SubmitError: Slurm takes none.
        """
        pauses_s = clock.pauses_s(*_LOOK_S)
        seen = -1
        while True:
            state = self._reader.read()
            live = self._look_after(state)
            self._on_state(state)
            if state.is_complete:
                break
            finished = sum(standing.is_final for standing in state.standings.values())
            if finished != seen:
                seen, pauses_s = finished, clock.pauses_s(*_LOOK_S)
            if (count := self._missing(state, live)) > 0:
                self._submit(count)
                continue
            clock.sleep(next(pauses_s))
        self._say_goodbye()
        return self._reader.read()

    def _missing(self, state: RunState, live: int) -> int:
        """How many pilots there should be more."""
        work = len(state.open_tasks)
        if not work:
            return 0
        if self._wanted.one_job_per_task:
            return max(0, work - live)
        most = 1 if self._is_first_to_be_seen(state) else self._wanted.pilots
        return max(0, min(most, -(-work // self._pilot.slots)) - live)

    def _is_first_to_be_seen(self, state: RunState) -> bool:
        """Whether no sandbox of this run has been seen to start: then one pilot goes first.

        Raises:
            JobEndedError: it does not.
        """
        if not self._pilot.is_careful:
            return False
        ended = [one.record for attempts in state.attempts.values() for one in attempts if one.record is not None]
        if any(record.failure_class not in ("image", "start") for record in ended):
            return False
        if ended:
            first = min(ended, key=lambda record: record.started_at)
            raise JobEndedError(
                f"The first task's sandbox did not start: {first.task}, attempt {first.attempt}.",
                evidence=first.error,
                remedy="Nothing else was begun. Mend that, and run the same again; smoke=False goes on without a look.",
            )
        return True

    def _look_after(self, state: RunState) -> int:
        """Say what became of pilots that are gone; returns how many there still are, running or queued."""
        begun = {pilot.job for pilot in state.pilots.values()}
        live = 0
        now_s: float | None = None
        for pilot in state.pilots.values():
            if pilot.fate is not None or pilot.is_superseded:
                continue
            if (fate := self._find_fate(pilot)) is None and not pilot.is_gone:
                now_s = self._run.server_time_s() if now_s is None else now_s
                fate = self._find_stale(pilot, now_s)
            if fate is not None:
                self._note_fate(pilot, fate)
            elif not pilot.is_gone:
                live += 1
        for job in self._jobs - begun:
            if self._has_ended(job):
                self._jobs.discard(job)
                self._note_barren(job, "")
            else:
                live += 1
        for pilot in state.pilots.values():
            if pilot.ended is not None and pilot.name not in self._ended:
                self._ended.add(pilot.name)
                if pilot.ended.get("attempts") or not state.open_tasks:
                    self._barren = 0
                else:
                    self._note_barren(pilot.name, str(pilot.ended.get("why")))
        return live

    def _find_fate(self, pilot: PilotView) -> dict[str, object] | None:
        """What became of a pilot's job, where somebody knows."""
        if pilot.ended is not None and pilot.ended.get("failure_class") is None:
            return None  # its own word is enough
        if (state := self._slurm_state(pilot.job)) is not None:
            return {"state": state, "failure_class": class_of_state(state)}
        if pilot.ended is None and pilot.is_gone:
            return {"state": "", "failure_class": "lost"}
        return None

    def _find_stale(self, pilot: PilotView, now_s: float) -> dict[str, object] | None:
        """That nobody has heard of it for long, and Slurm does not say that it runs."""
        if self._is_known_to_run(pilot.job):
            return None
        try:
            beat_s = (self._run.pilot_dir(pilot.name) / "alive").stat().st_mtime
        except OSError:
            # It has made its directory, and has not got further yet.
            beat_s = self._run.pilot_dir(pilot.name).stat().st_mtime
        if now_s - beat_s < _STALE_S:
            return None
        return {"state": "", "failure_class": "lost", "silent_s": round(now_s - beat_s)}

    def _slurm_state(self, job: str) -> str | None:
        """The final state of a job in Slurm; None while it has none, or for one of this machine."""
        if job.startswith("local-"):
            return None
        with contextlib.suppress(SchedulerUnavailableError):
            status = view.status(job, max_age_s=_ASK_SLURM_S)
            if status is not None and status.is_final:
                return status.state
        return None

    def _is_known_to_run(self, job: str) -> bool:
        if job.startswith("local-"):
            return False
        try:
            status = view.status(job, max_age_s=_ASK_SLURM_S)
        except SchedulerUnavailableError:
            return True  # silence is no news
        return status is not None and not status.is_final

    def _has_ended(self, job: str) -> bool:
        """Whether a job that never began as a pilot is gone."""
        if (submitted := self._submitted.get(job)) is not None and self._wanted.slurm is None:
            return submitted.has_ended
        if self._wanted.slurm is None:
            return True  # of an earlier call, and it would have begun long ago
        submitted_s = self._submitted_s.get(job, -math.inf)
        try:
            status = view.status(job, max_age_s=_ASK_SLURM_S, not_before_s=submitted_s)
        except SchedulerUnavailableError:
            return False
        if status is None:
            # Neither there yet, nor any more.
            return clock.now_s() - submitted_s > _APPEARS_S
        # What a pilot that has ended has written may be seen a moment later.
        return status.is_final and clock.now_s() - submitted_s > _APPEARS_S

    def _note_fate(self, pilot: PilotView, fate: dict[str, object]) -> None:
        self._run.write_about(pilot.name, "fate", {**fate, "noted_at": clock.wall_s()})
        if pilot.ended is None or fate.get("state"):
            word = fate.get("state") or "nobody knows how"
            self._say(f"pilot {pilot.name} is gone ({word}): what it had begun is done again")

    def _note_barren(self, job: str, why: str) -> None:
        """A pilot that ended and had not begun anything, while there was something to do.

        Raises:
            JobEndedError: the third in a row.
        """
        self._barren += 1
        if self._barren < _BARREN_MAX:
            return
        if why == "time":
            raise JobEndedError(
                "The pilots' time limit is too short for one task.",
                evidence=f"A task may take {self._pilot.task_timeout_s or 0:g} s, and a minute is kept back.",
                remedy="Raise slurm.time, or lower task_timeout.",
            )
        submitted = self._submitted.get(job)
        tail = submitted.log_tail() if submitted is not None else ""
        raise JobEndedError(
            "Pilots end before they do anything.",
            evidence=tail or f"The last of them was {job}; see {self._run.path / 'jobs'}. {why}".strip(),
            remedy="Does the interpreter on the nodes have hpc_workspace, and the agent's own modules?",
        )

    def _submit(self, count: int) -> None:
        slurm = self._wanted.slurm
        longest = min(count, self._wanted.array_max or count)
        for size in [longest] * (count // longest) + ([count % longest] if count % longest else []):
            pilot = dataclasses.replace(self._pilot, is_careful=self._pilot.is_careful and not self._submitted)
            submitted = submit_pilots(pilot, size, self._run.path / "jobs", slurm)
            jobs = [one.job_id for one in submitted]
            self._submitted.update(zip(jobs, submitted, strict=True))
            self._jobs |= set(jobs)
            self._submitted_s.update(dict.fromkeys(jobs, clock.now_s()))
            kind = "local" if slurm is None else "slurm"
            self._run.note_submission({"jobs": jobs, "kind": kind, "submitted_at": clock.wall_s()})
            self._say(f"{size} pilot{'s' if size > 1 else ''} submitted: {_shown(jobs)}")

    def _say_goodbye(self) -> None:
        """Wait for the pilots' own ends: they see by themselves that there is nothing left. Those that queue go."""
        begun = {pilot.job for pilot in self._reader.read().pilots.values()}
        queued = [job for job in self._jobs - begun if not job.startswith("local-")]
        with contextlib.suppress(SchedulerUnavailableError):
            cancel_jobs(queued)
        deadline = clock.Deadline(_GOODBYE_S)
        for pause_s in clock.pauses_s(0.05, 1.0):
            if not self._look_after(self._reader.read()) or deadline.is_over:
                return
            clock.sleep(pause_s)


def _shown(jobs: Iterable[str]) -> str:
    names = list(jobs)
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} … {names[-1]}"
