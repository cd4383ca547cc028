"""A run's directory: the truth about a run. One writer a file; whatever can be derived is derived.

<run dir>/                          0700
    tasks/<task>.json               what is to be done
    claims/<task>/                  made by the pilot that works on it: mkdir is atomic on NFS and Lustre too
    attempts/<task>/<n>/record.json how attempt n ended; written aside, then renamed
    results.jsonl                   one line a task, derived from the records
    pilots/                         submitit's own files
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_workspace import files
from hpc_workspace.errors import ConfigError
from hpc_workspace.rendezvous import make_private_dir

_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,199}")


class RunDir:
    """One run's directory. Holds a path and nothing else."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def prepare(self, tasks: Iterable[Mapping[str, Any]]) -> None:
        """Make the directory, or find it as an earlier call left it, and write down the tasks.

        Raises:
            ConfigError: a task has no usable `id`, or two have the same.
        """
        for name in ("tasks", "claims", "attempts", "pilots"):
            make_private_dir(self.path / name)
        seen: set[str] = set()
        for task in tasks:
            name = str(task.get("id", ""))
            if not _TASK_ID.fullmatch(name) or name in seen:
                raise ConfigError(
                    f"The task id {name!r} is {'there twice' if name in seen else 'not usable as a file name'}.",
                    option="tasks",
                    remedy="Give each task an id of letters, digits and . _ @ + -.",
                )
            seen.add(name)
            self._write(self.path / "tasks" / f"{name}.json", task)

    def task_ids(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "tasks").glob("*.json"))

    def task(self, task_id: str) -> dict[str, Any]:
        task: dict[str, Any] = json.loads((self.path / "tasks" / f"{task_id}.json").read_text())
        return task

    def unfinished(self) -> list[str]:
        """Tasks without a terminal record."""
        return [task_id for task_id in self.task_ids() if self.last_record(task_id) is None]

    def release_claims(self) -> None:
        """Let tasks that were claimed and never finished be claimed again. Only while no pilot runs."""
        for task_id in self.unfinished():
            claim = self.path / "claims" / task_id
            if claim.is_dir():
                claim.rmdir()

    def claim_next(self) -> str | None:
        """A task that is nobody's yet, now the caller's; None if there is none."""
        taken = set(os.listdir(self.path / "claims"))
        for task_id in self.task_ids():
            if task_id in taken:
                continue
            try:
                (self.path / "claims" / task_id).mkdir(mode=0o700)
            except FileExistsError:
                continue
            return task_id
        return None

    def start_attempt(self, task_id: str) -> int:
        """The number of a new attempt, from 1; its directory is there."""
        folder = self.path / "attempts" / task_id
        folder.mkdir(mode=0o700, exist_ok=True)
        number = len(list(folder.iterdir())) + 1
        (folder / str(number)).mkdir(mode=0o700)
        return number

    def finish_attempt(self, task_id: str, number: int, record: Mapping[str, Any]) -> None:
        self._write(self.path / "attempts" / task_id / str(number) / "record.json", record)

    def last_record(self, task_id: str) -> dict[str, Any] | None:
        """The newest attempt's terminal record; None if no attempt has one."""
        folder = self.path / "attempts" / task_id
        if not folder.is_dir():
            return None
        for number in sorted((int(path.name) for path in folder.iterdir()), reverse=True):
            file = folder / str(number) / "record.json"
            if file.is_file():
                record: dict[str, Any] = json.loads(file.read_text())
                return record
        return None

    def write_results(self) -> list[dict[str, Any]]:
        """Derive results.jsonl from the records; returns its lines."""
        lines = [record for task_id in self.task_ids() if (record := self.last_record(task_id)) is not None]
        self._write_lines(self.path / "results.jsonl", (json.dumps(line) for line in lines))
        return lines

    def _write(self, path: Path, value: Mapping[str, Any]) -> None:
        self._write_lines(path, [json.dumps(value)])

    def _write_lines(self, path: Path, lines: Iterable[str]) -> None:
        files.write_whole(path, "".join(f"{line}\n" for line in lines).encode())
