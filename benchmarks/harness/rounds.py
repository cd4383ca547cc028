"""Rounds: every contestant of a row once in each, in an order that turns, and what came of it."""

from __future__ import annotations

import cProfile
import io
import pstats
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.harness.places import Places
from benchmarks.harness.values import Contestant, Goal, NotMeasuredError, Row
from benchmarks.harness.worker_process import WorkerError
from hpc_workspace.errors import WorkspaceError

_PROFILED_TIMES = 50
_PROFILED_S = 5.0
_PROFILE_LINES = 30


@dataclass
class Measured:
    """What the rounds of a row gave.

    Attributes:
        samples: by contestant, one a round, in the row's unit.
        absent: by contestant, why it was not measured, or not in all rounds.
        load: the machine's load average of one minute when the row began.
        profile: where the time of ours goes; empty where it was not looked at.
    """

    row: Row
    samples: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    load: float = 0.0
    profile: str = ""

    def figures(self, goal: Goal) -> list[float]:
        """What a goal's bound is for, round by round; empty where one of the two was not measured."""
        ours = self.samples.get(self.row.ours.name, [])
        other = ours if goal.against is None else self.samples.get(goal.against, [])
        if not ours or len(ours) != len(other):
            return []
        return [goal.of(*pair) for pair in zip(ours, other, strict=True)]


def in_turn(contestants: Sequence[Contestant], index: int) -> Iterator[Contestant]:
    """All of them, beginning with another one in each round: nobody always comes after the same one."""
    first = index % len(contestants)
    yield from contestants[first:]
    yield from contestants[:first]


def measure_row(row: Row, places: Places, rounds: int | None = None) -> Measured:
    """All rounds of a row. A contestant that can't be measured is named with the reason, and the others go on."""
    measured = Measured(row, load=places.load())
    for index in range(rounds or row.rounds):
        for contestant in in_turn(row.contestants, index):
            if contestant.name in measured.absent:
                continue
            try:
                for _ in range(row.warm_ups):
                    contestant.measure(places)
                value = contestant.measure(places)
            except NotMeasuredError as error:
                _drop(measured, contestant, str(error))
            except (WorkspaceError, WorkerError, OSError) as error:
                _drop(measured, contestant, f"it failed in round {index + 1}: {' '.join(str(error).split())[:300]}")
            else:
                measured.samples.setdefault(contestant.name, []).append(value)
    return measured


def _drop(measured: Measured, contestant: Contestant, reason: str) -> None:
    # A part of its rounds would not be interleaved with the others' any more.
    measured.samples.pop(contestant.name, None)
    measured.absent[contestant.name] = reason
    sys.stderr.write(f"  {contestant.name}: not measured: {reason}\n")


def profile_row(row: Row, places: Places) -> str:
    """Where the time of ours goes, as text: what the row says of it, or the top of cProfile's list."""
    if row.profile is not None:
        return row.profile(places)
    began_s = places.now_s()
    profiler = cProfile.Profile()
    times = 0
    while times < _PROFILED_TIMES and places.now_s() - began_s < _PROFILED_S:
        profiler.runcall(row.ours.measure, places)
        times += 1
    out = io.StringIO()
    stats = pstats.Stats(profiler, stream=out)
    out.write(f"{row.name}: {row.ours.name}, {times} times; the calling thread's own time, then cumulative\n")
    stats.strip_dirs().sort_stats("tottime").print_stats(_PROFILE_LINES)
    stats.sort_stats("cumulative").print_stats(_PROFILE_LINES)
    return out.getvalue()
