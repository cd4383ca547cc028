"""A run's directory: the truth about a run. One writer a file; whatever can be derived is derived.

<run dir>/                          0700
    run.json                        what was asked for: policy and options; by who started or resumed it last
    tasks/<n>-<digest>.jsonl        what is to be done, a line a task; never changed
    claims/<task>~<n>               a symbolic link to nowhere; its text is the pilot whose attempt n is
    attempts/<task>/<n>/            record.json, agent.log, server.log, patch, files/; by the pilot that claimed it
    pilots/<name>/                  pilot.json, alive (touched), records.jsonl, ended.json; by the pilot
                                    fate.json: what became of its job; by whoever watches the run
    submissions/<token>.json        the jobs of one submission; by who submitted it
    grants/<token>.json             further attempts, asked for by hand
    jobs/                           submitit's own files
    cancelled                       changes whenever the run is cancelled
    results.jsonl, report.html …    derived

A claim is made by symlink(2): one operation, exclusive on NFS and Lustre too, and it says whose it is; when a server's
answer was lost and the repetition finds the link there, its text tells whether it is our own. Claims are never taken
back: what a dead pilot had claimed is done again as the next attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_workspace import files
from hpc_workspace.batch.outcomes import AttemptRecord
from hpc_workspace.errors import ConfigError
from hpc_workspace.rendezvous import make_private_dir

_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,199}")
_BETWEEN = "~"
_FOLDERS = ("tasks", "claims", "attempts", "pilots", "submissions", "grants", "jobs")


class RunDir:
    """One run's directory. Holds a path and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def prepare(self, tasks: Iterable[Mapping[str, Any]]) -> None:
        """Make the directory, or find it as an earlier call left it, and write down the tasks that it does not have.

        Raises:
            ConfigError: a task has no usable `id`, two have the same, or one is not what it was in an earlier call.
        """
        checked = _check_tasks(tasks)
        make_private_dir(self.path)
        for name in _FOLDERS:
            make_private_dir(self.path / name)
        known = self.tasks()
        for name, task in checked.items():
            if name in known and known[name] != task:
                raise ConfigError(
                    f"Task {name} is not what it was in an earlier call with this run directory.",
                    option="tasks",
                    remedy="Use another run_dir, or another id.",
                )
        new = [task for name, task in checked.items() if name not in known]
        if new:
            data = "".join(f"{json.dumps(task)}\n" for task in new).encode()
            number = len(list(self.path.joinpath("tasks").glob("*.jsonl"))) + 1
            name = f"{number:04d}-{hashlib.sha256(data).hexdigest()[:12]}.jsonl"
            files.write_whole(self.path / "tasks" / name, data)

    def require(self) -> None:
        """Make sure that there is a run here. Raises: ConfigError: there is none."""
        if not (self.path / "run.json").is_file():
            raise ConfigError(
                f"{self.path} is no run's directory.", option="run_dir", remedy="Name the one that the run was given."
            )

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Every task by its id, in the order in which they came."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.path / "tasks").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                task = json.loads(line)
                found.setdefault(str(task["id"]), task)
        return found

    # Claims.

    def claim(self, task_id: str, number: int, pilot: str) -> bool:
        """Make attempt `number` of a task this pilot's. Returns whether it is; if not, it is another's."""
        path = self.path / "claims" / f"{task_id}{_BETWEEN}{number}"
        try:
            path.symlink_to(pilot)
        except FileExistsError:
            return self.claimant(task_id, number) == pilot
        return True

    def claims(self) -> dict[str, int]:
        """The number of each task's last attempt, for tasks that have one. One listing."""
        last: dict[str, int] = {}
        for name in os.listdir(self.path / "claims"):
            task_id, _, number = name.rpartition(_BETWEEN)
            if number.isdigit():
                last[task_id] = max(int(number), last.get(task_id, 0))
        return last

    def claimant(self, task_id: str, number: int) -> str:
        """The pilot whose attempt it is; empty if it is nobody's."""
        try:
            return os.readlink(self.path / "claims" / f"{task_id}{_BETWEEN}{number}")
        except OSError:
            return ""

    def claimed_at_s(self, task_id: str, number: int) -> float | None:
        """When it was claimed, by the file server's clock; None if it is nobody's."""
        try:
            return (self.path / "claims" / f"{task_id}{_BETWEEN}{number}").lstat().st_mtime
        except OSError:
            return None

    # Attempts.

    def attempt_dir(self, task_id: str, number: int) -> Path:
        return self.path / "attempts" / task_id / str(number)

    def begin_attempt(self, task_id: str, number: int) -> Path:
        """Its directory, made."""
        folder = self.attempt_dir(task_id, number)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def write_record(self, record: AttemptRecord) -> None:
        files.write_whole(
            self.attempt_dir(record.task, record.attempt) / "record.json", record.model_dump_json(indent=1).encode()
        )

    def read_record(self, task_id: str, number: int) -> AttemptRecord | None:
        """How an attempt ended, by its own word; None if nothing says so."""
        try:
            data = (self.attempt_dir(task_id, number) / "record.json").read_bytes()
        except FileNotFoundError:
            return None
        return AttemptRecord.model_validate_json(data)

    # Pilots.

    def pilot_dir(self, name: str) -> Path:
        return self.path / "pilots" / name

    def pilots(self) -> list[str]:
        """The names of all pilots that ever began."""
        return sorted(name for name in os.listdir(self.path / "pilots") if not name.startswith("."))

    def read_about(self, pilot: str, name: str) -> dict[str, Any] | None:
        """One of a pilot's JSON files (`pilot`, `ended` or `fate`); None if it is not there."""
        return _read_json(self.pilot_dir(pilot) / f"{name}.json")

    def write_about(self, pilot: str, name: str, value: Mapping[str, Any]) -> None:
        self._write(self.pilot_dir(pilot) / f"{name}.json", value)

    # The run as a whole.

    def write_run(self, value: Mapping[str, Any]) -> None:
        self._write(self.path / "run.json", value)

    def read_run(self) -> dict[str, Any]:
        return _read_json(self.path / "run.json") or {}

    def note_submission(self, value: Mapping[str, Any]) -> None:
        self._write(self.path / "submissions" / f"{secrets.token_hex(8)}.json", value)

    def submissions(self) -> list[dict[str, Any]]:
        """What was submitted, oldest first."""
        found = [_read_json(path) for path in (self.path / "submissions").glob("*.json")]
        return sorted((one for one in found if one is not None), key=lambda one: float(one["submitted_at"]))

    def grant(self, attempts: Mapping[str, int]) -> None:
        """Allow a further attempt after the one with this number, for each of these tasks."""
        if attempts:
            self._write(self.path / "grants" / f"{secrets.token_hex(8)}.json", dict(attempts))

    def grants(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in (self.path / "grants").glob("*.json"):
            for task_id, number in (_read_json(path) or {}).items():
                found[task_id] = max(int(number), found.get(task_id, 0))
        return found

    def write_derived(self, name: str, lines: Iterable[str]) -> None:
        """Put a derived file there, whole."""
        files.write_whole(self.path / name, "".join(f"{line}\n" for line in lines).encode())

    def server_time_s(self) -> float:
        """What time it is by the clock of the server that has the run."""
        return files.server_time_s(self.path / "pilots")

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        files.write_whole(path, json.dumps(value, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError):
        value: dict[str, Any] = json.loads(path.read_bytes())
        return value
    return None


def read_tasks(source: Iterable[Mapping[str, Any]] | str | Path) -> Iterator[Mapping[str, Any]]:
    """The tasks of a list, or of a JSONL file.

    Raises:
        ConfigError: the file can't be read, or a line is no JSON object.
    """
    if not isinstance(source, (str, Path)):
        yield from source
        return
    try:
        text = Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The tasks in {source} can't be read.", option="tasks", evidence=str(error)) from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            task = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{source}, line {number} is not JSON.", option="tasks", evidence=str(error)) from error
        if not isinstance(task, dict):
            raise ConfigError(f"{source}, line {number} is not an object.", option="tasks")
        yield task


def _check_tasks(tasks: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    checked: dict[str, dict[str, Any]] = {}
    for task in tasks:
        name = str(task.get("id", ""))
        if not _TASK_ID.fullmatch(name) or name in checked:
            raise ConfigError(
                f"The task id {name!r} is {'there twice' if name in checked else 'not usable as a file name'}.",
                option="tasks",
                remedy="Give each task an id of letters, digits and . _ @ + -.",
            )
        try:
            checked[name] = json.loads(json.dumps(task))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"Task {name} can't be written as JSON.", option="tasks", evidence=str(error)) from error
    return checked
