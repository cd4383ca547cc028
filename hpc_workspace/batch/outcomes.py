"""How attempts end, what is tried again, and where that leaves a task. Values and pure functions.

A task has attempts 1, 2, 3 …, each claimed once by one pilot, each in a sandbox of its own. An attempt that ended in
good order has a record. One whose pilot is gone has none, and never will: it was lost, by what became of the pilot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# What the agent did, or failed to do in time …
AGENT_CLASSES = ("agent", "task_timeout")
# … and what happened to it.
INFRA_CLASSES = ("image", "start", "lost", "oom", "preempted", "node_fail", "time_limit", "cancelled")
FAILURE_CLASSES = (*AGENT_CLASSES, *INFRA_CLASSES)

# By Slurm's word for the end of a pilot's job. squeue(1) of Slurm 24.11, JOB STATE CODES.
_BY_STATE = {
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "node_fail",
    "TIMEOUT": "time_limit",
    "DEADLINE": "time_limit",
    "OUT_OF_MEMORY": "oom",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}
_RETRIES = {
    "agent": 0,
    "task_timeout": 0,
    "image": 1,
    "start": 2,
    "lost": 3,
    "oom": 1,
    "preempted": 20,
    "node_fail": 5,
    "time_limit": 3,
    "cancelled": 20,
}
# What may pass by itself is not tried again at once.
_BACKED_OFF = ("image", "start", "lost")
_LONGEST_BACKOFF_S = 300.0


def class_of_state(state: str) -> str:
    """The failure class of attempts whose pilot's job ended in this state of Slurm's; `lost` where it says nothing."""
    return _BY_STATE.get(state, "lost")


class Policy(BaseModel):
    """What is tried again.

    Attributes:
        retries: how often, by failure class, over all attempts of a task.
        backoff_s: the pause before the first retry of a class that may pass by itself; it doubles, up to 5 minutes.
    """

    model_config = ConfigDict(frozen=True)

    retries: dict[str, int] = Field(default_factory=lambda: dict(_RETRIES))
    backoff_s: float = 5.0

    @classmethod
    def of(cls, retries: int | Mapping[str, int]) -> Policy:
        """The policy of a caller's word: a number is of the agent's own failures; names change the default of theirs.

        Raises:
            ValueError: it names no class, or a number is below zero.
        """
        given = dict.fromkeys(AGENT_CLASSES, retries) if isinstance(retries, int) else dict(retries)
        for name, count in given.items():
            if name not in FAILURE_CLASSES:
                raise ValueError(f"{name!r} is no failure class; there are {', '.join(FAILURE_CLASSES)}")
            if count < 0:
                raise ValueError(f"{name}: {count} is below zero")
        return cls(retries={**_RETRIES, **given})


class AttemptRecord(BaseModel):
    """attempts/<task>/<n>/record.json: how an attempt ended. Written once.

    Attributes:
        result: what the agent returned; None if it failed.
        error: what was wrong; empty if nothing was.
        started_at: seconds since the epoch, by the pilot's clock.
        duration_s: from before its workspace's start to after its close.
        agent_s: of it the agent's own; None if it never ran.
        peaks: the most that was seen of `memory_bytes` (proportional set size of all its processes) and `disk_bytes`.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    attempt: int
    status: Literal["done", "failed"]
    failure_class: str | None = None
    result: Any = None
    error: str = ""
    pilot: str = ""
    node: str = ""
    slot: int = 0
    started_at: float = 0.0
    duration_s: float = 0.0
    agent_s: float | None = None
    phases_s: dict[str, float] = Field(default_factory=dict)
    peaks: dict[str, int] = Field(default_factory=dict)


class Attempt(BaseModel):
    """One attempt as the run's directory tells it.

    Attributes:
        record: how it ended; None while it runs, or if nobody was left to say.
        lost_as: the failure class of one whose pilot is gone without a record; None for others.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    pilot: str
    record: AttemptRecord | None = None
    lost_as: str | None = None

    @property
    def is_running(self) -> bool:
        return self.record is None and self.lost_as is None

    @property
    def failure_class(self) -> str | None:
        return self.record.failure_class if self.record is not None else self.lost_as


TaskState = Literal["waiting", "running", "retry", "done", "failed"]


class Standing(BaseModel):
    """Where a task stands.

    Attributes:
        state: `waiting` for its first attempt, `running`, `retry` (waiting for a further one), `done`, `failed`.
        attempt: the one that counts: the first that is done, else the last; None before there is any.
        due_at: for `retry`, not before this (seconds since the epoch).
    """

    model_config = ConfigDict(frozen=True)

    state: TaskState
    attempt: Attempt | None = None
    due_at: float = 0.0

    @property
    def is_final(self) -> bool:
        return self.state in ("done", "failed")


def judge(attempts: Sequence[Attempt], policy: Policy, granted: int = 0) -> Standing:
    """Where a task with these attempts stands.

    Args:
        attempts: in the order of their numbers.
        granted: the number of the attempt after which a further one was asked for by hand; 0: none was.
    """
    if not attempts:
        return Standing(state="waiting")
    for attempt in attempts:
        # One that was taken for dead may have come back and finished, after another was begun: the first one counts.
        if attempt.record is not None and attempt.record.status == "done":
            return Standing(state="done", attempt=attempt)
    last = attempts[-1]
    if last.is_running:
        return Standing(state="running", attempt=last)
    failure = last.failure_class or "lost"
    failures = Counter(attempt.failure_class for attempt in attempts if attempt.number > granted)
    if last.number != granted and failures[failure] > policy.retries.get(failure, 0):
        return Standing(state="failed", attempt=last)
    due_at = 0.0
    if failure in _BACKED_OFF and last.record is not None:
        pause_s = policy.backoff_s * 2 ** max(0, failures[failure] - 1)
        due_at = last.record.started_at + last.record.duration_s + min(_LONGEST_BACKOFF_S, pause_s)
    return Standing(state="retry", attempt=last, due_at=due_at)
