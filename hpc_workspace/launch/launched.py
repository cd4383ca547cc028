"""What every launched node program has in common."""

from __future__ import annotations

from typing import Protocol

from hpc_workspace.errors import WorkspaceError


class Launched(Protocol):
    """A node program that was started, as its client sees it without the record.

    Guarantees: `find_end` returns None while it runs or while nobody knows, and else an error that says how it ended;
    it never blocks for longer than one question to Slurm. `end` asks for the end from outside the door. `wait_gone`
    is true once nothing of it runs any more. `describe` is a line for a person who waits. `has_left` is whether the
    life of its job that ran on `node` is over and the job is not: it waits again, or runs elsewhere. Without a job
    there is one life only. `has_ending_neighbour` is whether another job of this user is ending on `node`.

    `note_ready` tells it that its workspace is used, on `node`: part of what an end is called, and newer than all that
    Slurm had said by then.

    Attributes:
        job_id: Slurm's; None without Slurm.
    """

    job_id: str | None

    def find_end(self) -> WorkspaceError | None: ...
    def is_pending(self) -> bool: ...
    def note_ready(self, node: str) -> None: ...
    def has_left(self, node: str) -> bool: ...
    def has_ending_neighbour(self, node: str) -> bool: ...
    def end(self) -> None: ...
    def wait_gone(self, timeout_s: float) -> bool: ...
    def describe(self) -> str: ...
