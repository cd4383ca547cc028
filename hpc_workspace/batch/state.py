"""A run as its directory tells it: every task's standing, every pilot. Derived anew, or followed as it grows.

What is read grows with what has happened since the last look, not with the run: one listing of the claims, and what
each pilot has added to its own list of records.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc_workspace.batch.outcomes import Attempt, AttemptRecord, Policy, Standing, judge
from hpc_workspace.batch.run_dir import RunDir
from hpc_workspace.owner import Owner


@dataclass
class PilotView:
    """One pilot, as its files tell it.

    Attributes:
        about: its pilot.json: node, job, slots, start.
        ended: its own last word; None while it works, or if it had no time for one.
        fate: what whoever watched the run says became of it; None: nothing yet.
    """

    name: str
    about: Mapping[str, Any] = field(default_factory=dict)
    ended: Mapping[str, Any] | None = None
    fate: Mapping[str, Any] | None = None
    read_bytes: int = 0
    is_superseded: bool = False

    @property
    def job(self) -> str:
        """The id of its job; its name, where it has not got round to saying so."""
        return str(self.about.get("job", self.name))

    @property
    def is_gone(self) -> bool:
        """Whether it is certain that it does no more."""
        if self.ended is not None or self.fate is not None or self.is_superseded:
            return True
        owner = Owner.parse(str(self.about.get("owner", "")))
        return owner is not None and owner.fate() == "dead"

    @property
    def lost_as(self) -> str:
        """The failure class of attempts that it left without a record."""
        for said in (self.fate, self.ended):
            if said is not None and said.get("failure_class"):
                return str(said["failure_class"])
        return "lost"


@dataclass(frozen=True)
class RunState:
    """A run at one moment.

    Attributes:
        standings: every task, in the order in which they came.
        attempts: all attempts of each task that has any, in order.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    standings: Mapping[str, Standing]
    attempts: Mapping[str, list[Attempt]]
    pilots: Mapping[str, PilotView]

    @property
    def open_tasks(self) -> list[str]:
        """Tasks that wait for an attempt."""
        return [name for name, standing in self.standings.items() if standing.state in ("waiting", "retry")]

    @property
    def is_complete(self) -> bool:
        return all(standing.is_final for standing in self.standings.values())


class RunReader:
    """Follows a run's directory."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._tasks: dict[str, dict[str, Any]] = {}
        self._task_files: set[str] = set()
        self._pilots: dict[str, PilotView] = {}
        self._records: dict[tuple[str, int], AttemptRecord] = {}
        self._claimants: dict[tuple[str, int], str] = {}
        self.policy = Policy()

    def read(self) -> RunState:
        """The run as it is now.

        Raises:
            OSError: the directory can't be read.
        """
        if names := {path.name for path in (self._run.path / "tasks").glob("*.jsonl")} - self._task_files:
            self._tasks, self._task_files = self._run.tasks(), self._task_files | names
        if policy := self._run.read_run().get("policy"):
            self.policy = Policy.model_validate(policy)
        # The claims first: what is claimed after this look is running, or not there yet.
        claims = self._run.claims()
        self._read_pilots()
        grants = self._run.grants()
        attempts = {name: self._attempts(name, claims[name]) for name in self._tasks if name in claims}
        standings = {name: judge(attempts.get(name, []), self.policy, grants.get(name, 0)) for name in self._tasks}
        return RunState(self._tasks, standings, attempts, dict(self._pilots))

    def _read_pilots(self) -> None:
        for name in self._run.pilots():
            pilot = self._pilots.setdefault(name, PilotView(name))
            if pilot.ended is None:
                pilot.about = pilot.about or self._run.read_about(name, "pilot") or {}
                # Its last word before its records: what it says last is then among them.
                ended = self._run.read_about(name, "ended")
                self._read_records(pilot)
                pilot.ended = ended
            if pilot.fate is None:
                pilot.fate = self._run.read_about(name, "fate")
        lives: dict[str, list[PilotView]] = {}
        for pilot in self._pilots.values():
            lives.setdefault(pilot.job, []).append(pilot)
        for same_job in lives.values():
            same_job.sort(key=lambda one: int(one.about.get("restarts", 0)))
            for earlier in same_job[:-1]:
                earlier.is_superseded = True

    def _read_records(self, pilot: PilotView) -> None:
        try:
            with (self._run.pilot_dir(pilot.name) / "records.jsonl").open("rb") as file:
                file.seek(pilot.read_bytes)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        pilot.read_bytes += len(whole)
        for line in whole.splitlines():
            record = AttemptRecord.model_validate(json.loads(line))
            self._records[record.task, record.attempt] = record

    def _attempts(self, task_id: str, last: int) -> list[Attempt]:
        return [self._attempt(task_id, number) for number in range(1, last + 1)]

    def _attempt(self, task_id: str, number: int) -> Attempt:
        key = (task_id, number)
        if (record := self._records.get(key)) is not None:
            return Attempt(number=number, pilot=record.pilot, record=record)
        if key not in self._claimants:
            self._claimants[key] = self._run.claimant(task_id, number)
        name = self._claimants[key]
        pilot = self._pilots.get(name)
        if pilot is None or not pilot.is_gone:
            return Attempt(number=number, pilot=name)
        # It may have died between an attempt's record and its own list.
        record = self._run.read_record(task_id, number)
        if record is None:
            return Attempt(number=number, pilot=name, lost_as=pilot.lost_as)
        self._records[key] = record
        return Attempt(number=number, pilot=name, record=record)
