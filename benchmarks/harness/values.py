"""What is measured, against what, and what is wanted: rows, contestants and goals, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.harness.places import Places

Role = Literal["ours", "floor", "peer"]
Unit = Literal["ms", "s", "1/s", "MiB/s", "MiB"]
Node = Literal["n01", "login"]
# One measurement, in the unit of its row. Raises NotMeasuredError where it can't be had.
Measure = Callable[["Places"], float]

# Of these more is better; of all others, less.
_MORE_IS_BETTER: frozenset[Unit] = frozenset({"1/s", "MiB/s"})


class NotMeasuredError(Exception):
    """A contestant that can't be measured here; its text is the reason, and stands in the report."""


@dataclass(frozen=True)
class Contestant:
    """One of those that a row compares.

    Attributes:
        name: what is measured, in a few words; unique in its row.
        role: `ours`; `floor`, what physics or the machine leaves nobody below; or `peer`, what others would use.
    """

    name: str
    role: Role
    measure: Measure


@dataclass(frozen=True)
class Goal:
    """What ours is to reach: a figure, or one relative to a contestant, taken round by round.

    Attributes:
        kind: `figure` (ours itself), `ratio` (ours / the other) or `difference` (ours - the other).
        bound: at most so much where less is better in the row, else at least.
        against: the other contestant's name; None for a figure.
    """

    kind: Literal["figure", "ratio", "difference"]
    bound: float
    against: str | None = None

    def __post_init__(self) -> None:
        if (self.kind == "figure") != (self.against is None):
            raise ValueError(f"a {self.kind} {'has nobody' if self.kind == 'figure' else 'needs somebody'} against it")

    def of(self, ours: float, other: float) -> float:
        """The figure that the bound is for, in one round."""
        return {"figure": ours, "ratio": ours / other if other else float("inf"), "difference": ours - other}[self.kind]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: short, for `make bench ROWS=…`.
        what: what is measured, for a person.
        node: the node of the test cluster on which it is measured.
        contestants: exactly one of them is ours.
        rounds: in each, every contestant is measured once; this is the n of its medians.
        warm_ups: so many measurements of the same contestant go before each that counts, so that it does not pay for
            what another one left in the caches.
        profile: what says where the time of ours goes, as text; None: cProfile of `ours.measure`.
    """

    name: str
    what: str
    unit: Unit
    node: Node
    contestants: tuple[Contestant, ...]
    goals: tuple[Goal, ...] = ()
    rounds: int = 60
    warm_ups: int = 0
    profile: Callable[[Places], str] | None = None

    def __post_init__(self) -> None:
        names = [contestant.name for contestant in self.contestants]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name}: two contestants of one name")
        if [contestant.role for contestant in self.contestants].count("ours") != 1:
            raise ValueError(f"{self.name}: one contestant is ours, no more and no less")
        if strangers := {goal.against for goal in self.goals} - {*names, None}:
            raise ValueError(f"{self.name}: a goal is against {', '.join(map(str, strangers))}, who is not in the row")

    @property
    def ours(self) -> Contestant:
        return next(contestant for contestant in self.contestants if contestant.role == "ours")

    @property
    def is_more_better(self) -> bool:
        return self.unit in _MORE_IS_BETTER

    def describe(self, goal: Goal) -> str:
        """The goal in words: `at most 4 ms`, `at least 0.9 of scp`, `at most 0.6 ms over direct`."""
        sign = "at least" if self.is_more_better else "at most"
        if goal.kind == "ratio":
            return f"{sign} {goal.bound:.3g} of {goal.against}"
        beside = f" over {goal.against}" if goal.kind == "difference" else ""
        return f"{sign} {goal.bound:g} {self.unit}{beside}"
