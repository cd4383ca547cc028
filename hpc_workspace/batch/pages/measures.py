"""What a run's attempts measured: how long each phase took, what was used, what failed and how. Values for plots."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_workspace.batch.outcomes import FAILURE_CLASSES, INFRA_CLASSES, Attempt, AttemptRecord
from hpc_workspace.batch.state import RunState

OUTCOMES = ("done", *FAILURE_CLASSES, "running")
# Of a workspace's own record of its start, what comes one after the other, on this side.
START_PHASES = ("image", "launch", "wait", "connect")
PHASES = (*START_PHASES, "agent", "close")


def outcome(attempt: Attempt) -> str:
    """`done`, `running`, or its failure class."""
    return "running" if attempt.is_running else attempt.failure_class or "done"


def every_attempt(state: RunState) -> Iterator[tuple[str, Attempt]]:
    """All attempts, each with its task's id."""
    for task_id, attempts in state.attempts.items():
        for attempt in attempts:
            yield task_id, attempt


def every_record(state: RunState) -> Iterator[AttemptRecord]:
    """The records of attempts that have one."""
    for _, attempt in every_attempt(state):
        if attempt.record is not None:
            yield attempt.record


def quantile(ordered: Sequence[float], part: float) -> float:
    """The value below which `part` of them lie (nearest rank). `ordered` is sorted and not empty."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


@dataclass(frozen=True)
class Spread:
    """How a quantity is spread over `count` values."""

    count: int
    median: float
    p95: float
    largest: float
    total: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.95), ordered[-1], sum(ordered))


def phases_of(record: AttemptRecord) -> dict[str, float]:
    """How long each phase of an attempt took, of those that it came to.

    `close` is what is left after the start and the agent: its patch and files are kept, the sandbox is closed.
    """
    found = {name: record.phases_s[name] for name in START_PHASES if name in record.phases_s}
    if record.agent_s is not None:
        found["agent"] = record.agent_s
        if "start" in record.phases_s:
            found["close"] = max(0.0, record.duration_s - record.phases_s["start"] - record.agent_s)
    return found


def phase_spreads(state: RunState) -> dict[str, Spread]:
    """Each phase that any attempt came to."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in every_record(state):
        for name, value in phases_of(record).items():
            values[name].append(value)
    return {name: spread for name in PHASES if (spread := Spread.of(values[name])) is not None}


def starts(state: RunState) -> list[tuple[float, float]]:
    """When each sandbox that came up was begun (seconds since the epoch), and how long that took; in order of time."""
    found = (
        (record.started_at, record.phases_s["start"]) for record in every_record(state) if "start" in record.phases_s
    )
    return sorted(found)


def peaks(state: RunState, name: str) -> list[int]:
    """The peaks of this name (`memory_bytes`, `disk_bytes`) of all attempts that have it."""
    return [record.peaks[name] for record in every_record(state) if name in record.peaks]


@dataclass
class Failure:
    """Attempts of one class that failed with the same last line.

    Attributes:
        examples: the first of them, each with its task's id.
    """

    name: str
    line: str
    count: int = 0
    examples: list[tuple[str, Attempt]] = field(default_factory=list)


_EXAMPLES = 4
_LINE = 200


def failures(state: RunState) -> dict[str, list[Failure]]:
    """Failed attempts by class, and within it by what was wrong; the most frequent first."""
    found: dict[tuple[str, str], Failure] = {}
    for task_id, attempt in every_attempt(state):
        name = outcome(attempt)
        if name in ("done", "running"):
            continue
        line = last_line(attempt.record.error) if attempt.record is not None else "Its pilot was gone."
        failure = found.setdefault((name, line), Failure(name, line))
        failure.count += 1
        if len(failure.examples) < _EXAMPLES:
            failure.examples.append((task_id, attempt))
    known = sorted({name for name, _ in found}, key=lambda name: (_rank(name), name))
    return {
        name: sorted((one for one in found.values() if one.name == name), key=lambda one: -one.count) for name in known
    }


def _rank(name: str) -> int:
    return OUTCOMES.index(name) if name in OUTCOMES else len(OUTCOMES)


def last_line(error: str) -> str:
    """Of a traceback or a message, the line that says most; short."""
    lines = [line.strip() for line in error[-5000:].split("\n") if line.strip()]
    return lines[-1][:_LINE] if lines else "It said nothing."


def slowest(state: RunState, count: int) -> list[AttemptRecord]:
    """The attempts that took longest."""
    return sorted(every_record(state), key=lambda record: -record.duration_s)[:count]


@dataclass
class NodeView:
    """What happened on one node."""

    attempts: int = 0
    lost: int = 0
    starts_s: list[float] = field(default_factory=list)


def nodes(state: RunState) -> dict[str, NodeView]:
    """Each node that anything ran on, those that lost most first."""
    found: dict[str, NodeView] = defaultdict(NodeView)
    for _, attempt in every_attempt(state):
        record, pilot = attempt.record, state.pilots.get(attempt.pilot)
        node = record.node if record is not None else str(pilot.about.get("node", "")) if pilot is not None else ""
        seen = found[node or "not known"]
        seen.attempts += 1
        seen.lost += outcome(attempt) in INFRA_CLASSES
        if record is not None and "start" in record.phases_s:
            seen.starts_s.append(record.phases_s["start"])
    return dict(sorted(found.items(), key=lambda item: (-item[1].lost, item[0])))


@dataclass(frozen=True)
class Returned:
    """One thing that agents returned, over all tasks that are done: how often it was true, or how it is spread."""

    key: str
    count: int
    true: int | None = None
    spread: Spread | None = None
    mean: float | None = None


def returned(results: Sequence[Mapping[str, Any]], most: int) -> tuple[list[Returned], int]:
    """Yes-or-no and number results by key (at the top of an object), the most frequent first; how many are left out.

    Args:
        results: the report's lines of tasks.
    """
    values: dict[str, list[Any]] = defaultdict(list)
    for line in results:
        if line["status"] != "done":
            continue
        result = line["result"]
        for key, value in (result if isinstance(result, dict) else {"(result)": result}).items():
            if isinstance(value, (bool, int, float)) and math.isfinite(value):
                values[key].append(value)
    by_use = sorted(values, key=lambda key: -len(values[key]))
    return [_summary(key, values[key]) for key in by_use[:most]], max(0, len(by_use) - most)


def _summary(key: str, values: list[Any]) -> Returned:
    if all(isinstance(value, bool) for value in values):
        return Returned(key, len(values), true=sum(values))
    numbers = [float(value) for value in values]
    return Returned(key, len(values), spread=Spread.of(numbers), mean=math.fsum(numbers) / len(numbers))


def attempts_by_outcome(state: RunState) -> Counter[str]:
    """How many attempts ended how."""
    return Counter(outcome(attempt) for _, attempt in every_attempt(state))
