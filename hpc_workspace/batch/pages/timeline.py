"""Pilots and their slots over time, as far as the run's files tell. Values for plots.

An attempt without a record has neither a beginning nor a slot that anybody wrote down: what its pilot's slots did
after their last record is then not known, and counts neither as busy nor as idle.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hpc_workspace.batch.pages.measures import every_attempt, every_record, outcome
from hpc_workspace.batch.state import PilotView, RunState

Span = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """One attempt on its slot, in seconds since the epoch."""

    begin_s: float
    end_s: float
    outcome: str
    task: str
    number: int


@dataclass(frozen=True)
class Lane:
    """One pilot.

    Attributes:
        begin_s, end_s: its life; the end of one that works on is the last moment that the run knows of.
        word: how it ended; empty while it works.
        slots: the bars of each slot, in order of time.
        unrecorded: its attempts without a record, by outcome: `running`, or what they were lost to.
    """

    name: str
    node: str
    begin_s: float
    end_s: float
    word: str
    slots: list[list[Bar]]
    unrecorded: Mapping[str, int]

    def tails(self) -> Iterator[Span | None]:
        """For each slot the time of which nothing is known, up to the pilot's end; None where there is none."""
        for bars in self.slots:
            begin_s = max((bar.end_s for bar in bars), default=self.begin_s)
            yield (begin_s, self.end_s) if self.unrecorded and begin_s < self.end_s else None


@dataclass(frozen=True)
class Timeline:
    """All pilots, in the order in which they began. `begin_s` and `end_s` are the run's; both 0 without any."""

    lanes: list[Lane]
    begin_s: float
    end_s: float

    @property
    def busy_s(self) -> float:
        """Slot seconds in attempts that have a record."""
        return sum(bar.end_s - bar.begin_s for lane in self.lanes for bars in lane.slots for bar in bars)

    @property
    def idle_s(self) -> float:
        """Slot seconds of pilots in which nothing ran, for certain."""
        had = sum((lane.end_s - lane.begin_s) * len(lane.slots) for lane in self.lanes)
        unknown = sum(tail[1] - tail[0] for lane in self.lanes for tail in lane.tails() if tail is not None)
        return max(0.0, had - unknown - self.busy_s)


def make_timeline(state: RunState) -> Timeline:
    """The timeline of a run; its last moment is the last one that its files tell of, so it can be made again."""
    bars: dict[str, list[tuple[int, Bar]]] = defaultdict(list)
    for record in every_record(state):
        end_s = record.started_at + max(0.0, record.duration_s)
        bar = Bar(record.started_at, end_s, record.failure_class or "done", record.task, record.attempt)
        bars[record.pilot].append((record.slot, bar))
    unrecorded: dict[str, Counter[str]] = defaultdict(Counter)
    for _, attempt in every_attempt(state):
        if attempt.record is None:
            unrecorded[attempt.pilot][outcome(attempt)] += 1
    moments = [moment for pilot in state.pilots.values() for moment in _moments(pilot)]
    moments += [moment for found in bars.values() for _, bar in found for moment in (bar.begin_s, bar.end_s)]
    if not moments:
        return Timeline([], 0.0, 0.0)
    latest_s = max(moments)
    successors = _successors(state.pilots)
    names = sorted({*state.pilots, *bars})
    lanes = [
        _lane(state.pilots.get(name) or PilotView(name), bars[name], unrecorded[name], successors.get(name), latest_s)
        for name in names
    ]
    return Timeline(sorted(lanes, key=lambda lane: (lane.begin_s, lane.name)), min(moments), latest_s)


def _moments(pilot: PilotView) -> Iterator[float]:
    """When anything is known of it."""
    if (begin_s := _number(pilot.about.get("started_at"))) is not None:
        yield begin_s
    if pilot.ended is not None and (end_s := _number(pilot.ended.get("ended_at"))) is not None:
        yield end_s


def _successors(pilots: Mapping[str, PilotView]) -> dict[str, float]:
    """When the next life of its job began, for pilots that had one."""
    lives: dict[str, list[PilotView]] = defaultdict(list)
    for pilot in pilots.values():
        lives[pilot.job].append(pilot)
    found = {}
    for same_job in lives.values():
        same_job.sort(key=lambda one: _number(one.about.get("started_at")) or 0.0)
        for earlier, later in itertools.pairwise(same_job):
            found[earlier.name] = _number(later.about.get("started_at")) or 0.0
    return found


def _lane(
    pilot: PilotView, bars: list[tuple[int, Bar]], unrecorded: Counter[str], next_s: float | None, latest_s: float
) -> Lane:
    slots: list[list[Bar]] = [[] for _ in range(_slot_count(pilot, bars))]
    for slot, bar in sorted(bars, key=lambda item: item[1].begin_s):
        slots[max(0, slot)].append(bar)
    begins = [bar.begin_s for _, bar in bars]
    if (began_s := _number(pilot.about.get("started_at"))) is not None:
        begins.append(began_s)
    begin_s = min(begins, default=latest_s)
    last_s = max((bar.end_s for _, bar in bars), default=begin_s)
    end_s = max(last_s, _end(pilot, begin_s, last_s, next_s, latest_s))
    return Lane(pilot.name, str(pilot.about.get("node", "")), begin_s, end_s, _word(pilot), slots, dict(unrecorded))


_SLOTS_MAX = 1024


def _slot_count(pilot: PilotView, bars: list[tuple[int, Bar]]) -> int:
    asked = pilot.about.get("slots")
    return max(1, min(asked, _SLOTS_MAX) if isinstance(asked, int) else 1, *(slot + 1 for slot, _ in bars))


def _end(pilot: PilotView, begin_s: float, last_s: float, next_s: float | None, latest_s: float) -> float:
    """When it ended, or what is nearest to that: nobody may have seen it go."""
    if pilot.ended is not None and (ended_s := _number(pilot.ended.get("ended_at"))) is not None:
        return ended_s
    if pilot.fate is None and next_s is None:
        return latest_s if not pilot.is_gone else last_s
    # Whoever watches may have noted it much later; it can't have outlived its time, its next life, or the run.
    bounds = [latest_s]
    for said in (_number((pilot.fate or {}).get("noted_at")), _number(pilot.about.get("ends_at")), next_s):
        if said is not None:
            bounds.append(said)
    return max(begin_s, min(bounds))


def _word(pilot: PilotView) -> str:
    if pilot.fate is not None:
        return str(pilot.fate.get("state") or pilot.fate.get("failure_class") or "gone")
    if pilot.ended is not None:
        return str(pilot.ended.get("why") or "ended")
    return "began anew" if pilot.is_superseded else ""


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


@dataclass(frozen=True)
class Slots:
    """How many slots, on the mean of a while, worked on what has a record, did nobody knows what, and were there."""

    busy: float
    unknown: float
    had: float


def slots_over_time(timeline: Timeline, begin_s: float, end_s: float, count: int) -> list[Slots]:
    """The means of `count` whiles of the same length. A moment's idleness is part of its mean, however short."""
    length_s = (end_s - begin_s) / count
    sums = [[0.0] * count for _ in range(3)]
    for lane in timeline.lanes:
        spans = [(0, bar.begin_s, bar.end_s) for bars in lane.slots for bar in bars]
        spans += [(1, *tail) for tail in lane.tails() if tail is not None]
        spans += [(2, lane.begin_s, lane.end_s)] * len(lane.slots)
        for kind, from_s, to_s in spans:
            _add(sums[kind], (from_s - begin_s) / length_s, (to_s - begin_s) / length_s)
    return [Slots(*parts) for parts in zip(*sums, strict=True)]


def _add(sums: list[float], start: float, stop: float) -> None:
    """Add to each of these whiles the part of it between `start` and `stop`, which are counted in whiles."""
    start, stop = max(0.0, start), min(float(len(sums)), stop)
    for index in range(int(start), math.ceil(stop)):
        sums[index] += max(0.0, min(index + 1, stop) - max(index, start))


def sessions(timeline: Timeline, most: int = 6) -> list[Span]:
    """The times in which there were pilots, without the long breaks between them (a run that was taken up days later).

    Returns:
        At most `most` spans, in order; a break is longer than ten minutes and than a twentieth of the whole.
    """
    whole_s = timeline.end_s - timeline.begin_s
    merged: list[list[float]] = []
    for lane in timeline.lanes:
        if merged and lane.begin_s - merged[-1][1] <= max(600.0, whole_s / 20):
            merged[-1][1] = max(merged[-1][1], lane.end_s)
        else:
            merged.append([lane.begin_s, lane.end_s])
    while len(merged) > most:
        at = min(range(1, len(merged)), key=lambda index: merged[index][0] - merged[index - 1][1])
        merged[at - 1 : at + 1] = [[merged[at - 1][0], merged[at][1]]]
    return [(begin_s, max(end_s, begin_s + 1.0)) for begin_s, end_s in merged]
