"""A pilot: claims tasks, and gives each a process and a workspace of its own on this node, until there is none left.

It is one thread that forks and waits, so that an agent that hangs, crashes or is killed takes nothing else with it,
and so that a time-out can be kept by a signal. Its attempts hold the end of a pipe: if it is killed, they end too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hpc_workspace import clock, procfs
from hpc_workspace.batch.arrays import local_name
from hpc_workspace.batch.attempt import Job, run_attempt
from hpc_workspace.batch.claimer import Claimer
from hpc_workspace.batch.outcomes import AttemptRecord
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.batch.state import RunReader
from hpc_workspace.owner import Owner

HEARTBEAT_S = 10.0
_LOOK_S = 1.0
_PEAKS_S = 5.0
# Longer than a close takes; then it is killed, and its workspace's own node program clears up.
_GRACE_S = 45.0
# What is kept back of a pilot's time, to end in good order.
_RESERVE_S = 60.0
# How long a pilot without work waits for a retry that is not due yet.
_WAIT_FOR_RETRY_S = 60.0
_DRAIN = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Pilot:
    """What one array task runs; travels by submitit. `cwd` and `import_path` are the caller's.

    Attributes:
        slots: how many tasks it works on at once.
        task_timeout_s: for one attempt, from its workspace's start; None: as long as the pilot has.
        memory_bytes: what all processes of one attempt may use together; None: no bound of ours.
        tasks_max: after so many it ends; None: when there are none.
        is_careful: one task first, and the others once that has begun to work.
    """

    job: Job
    run_dir: Path
    slots: int
    cwd: str
    import_path: tuple[str, ...]
    task_timeout_s: float | None = None
    memory_bytes: int | None = None
    tasks_max: int | None = None
    is_careful: bool = False

    def __call__(self, index: int) -> int:
        """Work until no task is left. Returns how many attempts ended with a record."""
        sys.path[:] = [*self.import_path, *(path for path in sys.path if path not in self.import_path)]
        os.chdir(self.cwd)
        return _Supervisor(self, RunDir(self.run_dir)).run()


@dataclass
class _Running:
    """An attempt under way."""

    task_id: str
    number: int
    pid: int
    slot: int
    began: clock.Deadline
    wall_s: float
    peaks: dict[str, int] = field(default_factory=dict)
    # Why it was told to end, and since when; None: it was not.
    ended_as: str | None = None
    told: clock.Deadline | None = None


class _Supervisor:
    def __init__(self, pilot: Pilot, run: RunDir) -> None:
        self._pilot = pilot
        self._run = run
        self.name, self._job = _name()
        self._node = socket.gethostname().partition(".")[0]
        self._reader = RunReader(run)
        self._running: dict[int, _Running] = {}
        self._is_draining = self._is_ending = False
        self._begun = self._recorded = 0
        self._beat: clock.Deadline | None = None
        self._peaks_taken = clock.Deadline(None)
        self._why = "no tasks"
        self._end_at_s = float(os.environ.get("SLURM_JOB_END_TIME") or "inf")
        self._wake_in, self._wake_out = os.pipe()
        self._lifeline_in, self._lifeline_out = os.pipe()

    def run(self) -> int:
        self._install_handlers()
        folder = self._run.pilot_dir(self.name)
        folder.mkdir(mode=0o700, exist_ok=True)
        about = {
            "name": self.name,
            "job": self._job,
            "restarts": _restarts(),
            "node": self._node,
            "owner": str(Owner.of(os.getpid())),
            "slots": self._pilot.slots,
            "started_at": clock.wall_s(),
            "ends_at": None if self._end_at_s == float("inf") else self._end_at_s,
        }
        self._run.write_about(self.name, "pilot", about)
        self._touch()
        self._state = self._reader.read()
        self._claimer = Claimer(self._run, self.name, list(self._state.tasks))
        try:
            self._work()
        finally:
            self._end_all("lost")
            ended = {"why": self._why, "ended_at": clock.wall_s(), "attempts": self._begun}
            if self._why in ("terminated", "time"):
                ended["failure_class"] = "cancelled" if self._why == "terminated" else "time_limit"
            self._run.write_about(self.name, "ended", ended)
        return self._recorded

    def _work(self) -> None:
        while True:
            if not self._is_draining:
                while len(self._running) < self._slots() and (claimed := self._claim()) is not None:
                    self._begin(*claimed)
            if not self._running and (self._is_draining or not self._waits_for_retry()):
                return
            self._wait()
            self._touch()
            self._reap()
            self._watch()

    def _slots(self) -> int:
        if self._pilot.tasks_max is not None:
            left = self._pilot.tasks_max - self._begun + len(self._running)
            return min(self._pilot.slots, left)
        return 1 if self._pilot.is_careful and not self._recorded else self._pilot.slots

    def _claim(self) -> tuple[str, int] | None:
        """A task and the number of its attempt, now ours; None if there is none, or no time for one."""
        needed_s = self._pilot.task_timeout_s or 0.0
        if self._end_at_s - clock.wall_s() < needed_s + _RESERVE_S:
            self._is_draining, self._why = True, "time"
            return None
        if (task_id := self._claimer.next_fresh()) is not None:
            return task_id, 1
        self._state = self._reader.read()
        now_s = clock.wall_s()
        for task_id in self._state.open_tasks:
            standing = self._state.standings[task_id]
            number = standing.attempt.number + 1 if standing.attempt is not None else 1
            if standing.due_at <= now_s and self._run.claim(task_id, number, self.name):
                return task_id, number
        return None

    def _waits_for_retry(self) -> bool:
        """Whether a retry is due soon, as of the look that found nothing to claim."""
        if self._pilot.tasks_max is not None and self._begun >= self._pilot.tasks_max:
            return False
        due = [self._state.standings[task_id].due_at for task_id in self._state.open_tasks]
        return bool(due) and min(due) - clock.wall_s() < _WAIT_FOR_RETRY_S

    def _begin(self, task_id: str, number: int) -> None:
        slot = min(set(range(self._pilot.slots)) - {running.slot for running in self._running.values()})
        self._begun += 1
        wall_s = clock.wall_s()
        pid = os.fork()
        if pid == 0:
            self._be_attempt(task_id, number, slot)
        self._running[pid] = _Running(task_id, number, pid, slot, clock.Deadline(self._pilot.task_timeout_s), wall_s)

    def _be_attempt(self, task_id: str, number: int, slot: int) -> None:
        """In the child: never returns."""
        code = 70  # EX_SOFTWARE
        try:
            signal.set_wakeup_fd(-1)
            for signal_number in (signal.SIGTERM, signal.SIGCHLD, *_DRAIN):
                signal.signal(signal_number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for descriptor in (self._wake_in, self._wake_out, self._lifeline_out):
                os.close(descriptor)
            os.setsid()
            folder = self._run.begin_attempt(task_id, number)
            log = os.open(folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            threading.Thread(target=_end_with, args=(self._lifeline_in,), daemon=True).start()
            task = dict(self._state.tasks[task_id])
            run_attempt(self._pilot.job, self._run, task, number, pilot=self.name, node=self._node, slot=slot)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - whatever it was, this process must not go on as a pilot
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _wait(self) -> None:
        """Until a child ends, a signal comes, or it is time to look."""
        ready, _, _ = select.select([self._wake_in], [], [], _LOOK_S)
        if ready:
            os.read(self._wake_in, 4096)

    def _touch(self) -> None:
        if self._beat is not None and self._beat.elapsed_s < HEARTBEAT_S:
            return
        alive = self._run.pilot_dir(self.name) / "alive"
        descriptor = os.open(alive, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)
        self._beat = clock.Deadline(None)

    def _reap(self) -> None:
        for pid in list(self._running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._note_end(self._running.pop(pid), os.waitstatus_to_exitcode(status))

    def _note_end(self, running: _Running, code: int) -> None:
        """An attempt's process is gone: see to it that there is a record, unless it was ended to have none."""
        record = self._run.read_record(running.task_id, running.number)
        if record is None:
            if running.ended_as in ("lost", "time_limit", "cancelled"):
                return
            record = self._stand_in(running, code)
        record = record.model_copy(update={"peaks": running.peaks})
        self._run.write_record(record)
        with (self._run.pilot_dir(self.name) / "records.jsonl").open("ab") as file:
            file.write(record.model_dump_json().encode() + b"\n")
        self._recorded += 1
        if self._pilot.is_careful and self._recorded == 1 and record.failure_class in ("image", "start"):
            self._is_draining, self._why = True, "the first task's sandbox did not start"

    def _stand_in(self, running: _Running, code: int) -> AttemptRecord:
        """The record of an attempt that could not write its own."""
        if running.ended_as is not None:
            failure = running.ended_as
            error = f"It had {self._pilot.task_timeout_s:g} s." if failure == "task_timeout" else ""
            if failure == "oom":
                error = f"Its processes used {running.peaks.get('memory_bytes', 0)} bytes together."
        elif code < 0:
            failure, error = "lost", f"Its process was killed by {signal.Signals(-code).name}."
        else:
            failure, error = "agent", f"Its process ended with exit code {code} before the agent returned."
        return AttemptRecord(
            task=running.task_id,
            attempt=running.number,
            status="failed",
            failure_class=failure,
            error=error,
            pilot=self.name,
            node=self._node,
            slot=running.slot,
            started_at=running.wall_s,
            duration_s=round(running.began.elapsed_s, 3),
        )

    def _watch(self) -> None:
        is_at_its_end = self._end_at_s - clock.wall_s() < _GRACE_S
        if self._is_ending:
            self._why = "terminated"
        elif is_at_its_end:
            self._why = "time"
        for running in self._running.values():
            if self._is_ending:
                self._tell_end(running, "cancelled")
            elif is_at_its_end:
                self._tell_end(running, "time_limit")
            elif running.began.is_over:
                self._tell_end(running, "task_timeout")
        self._kill_overdue()
        if self._peaks_taken.elapsed_s >= (_LOOK_S if self._pilot.memory_bytes else _PEAKS_S):
            self._peaks_taken = clock.Deadline(None)
            self._take_peaks()

    def _take_peaks(self) -> None:
        processes = procfs.read_processes()
        for running in self._running.values():
            family = procfs.descendants(running.pid, processes=processes)
            used = sum(procfs.memory_bytes(pid) for pid in (running.pid, *(one.pid for one in family)))
            running.peaks["memory_bytes"] = max(used, running.peaks.get("memory_bytes", 0))
            if self._pilot.memory_bytes is not None and used > self._pilot.memory_bytes:
                self._tell_end(running, "oom")

    def _tell_end(self, running: _Running, ended_as: str) -> None:
        if running.told is None:
            running.ended_as, running.told = ended_as, clock.Deadline(_GRACE_S)
            _signal(running.pid, signal.SIGTERM)

    def _kill_overdue(self) -> None:
        for running in self._running.values():
            if running.told is not None and running.told.is_over:
                _signal(running.pid, signal.SIGKILL)

    def _end_all(self, ended_as: str) -> None:
        """Leave no attempt running, whatever went wrong here."""
        for running in self._running.values():
            self._tell_end(running, ended_as)
        while self._running:
            self._wait()
            self._reap()
            self._kill_overdue()

    def _install_handlers(self) -> None:
        """submitit has the pilot ignore SIGTERM, and wants SIGUSR2 for itself."""
        os.set_blocking(self._wake_out, False)
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        for number in _DRAIN:
            signal.signal(number, self._on_drain)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._is_draining = self._is_ending = True

    def _on_drain(self, number: int, frame: FrameType | None) -> None:
        self._is_draining = True
        if self._why == "no tasks":
            self._why = "drained"


def _name() -> tuple[str, str]:
    """The pilot's name, one for each life of its job, and its job's id; without Slurm a process stands for it."""
    if (local := os.environ.get("SUBMITIT_LOCAL_JOB_ID")) and os.environ.get("SUBMITIT_EXECUTOR") == "local":
        job = local_name(local)
        return f"{job}-{secrets.token_hex(4)}", job
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    restarts = _restarts()
    return (f"{job}.r{restarts}" if restarts else job), job


def _restarts() -> int:
    """How many lives its job had before this one."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _note(number: int, frame: FrameType | None) -> None:
    """Something to wake up for."""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _end_with(lifeline: int) -> None:
    """In an attempt: when the pilot is gone, end as by SIGTERM."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)


__all__ = ["HEARTBEAT_S", "Pilot"]
