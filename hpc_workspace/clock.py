"""Time: the only module that sleeps, and deadlines that say how much is left."""

from __future__ import annotations

import time
from collections.abc import Iterator


def now_s() -> float:
    """Seconds on a clock that never jumps; only differences mean something."""
    return time.monotonic()


def wall_s() -> float:
    """Seconds since the epoch, for people and for records."""
    return time.time()


def sleep(seconds: float) -> None:
    """Wait. Everything that waits for something it can't be told of goes through here."""
    time.sleep(max(0.0, seconds))


class Deadline:
    """A moment in the future, or never (`timeout_s=None`)."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self.started_s = now_s()

    @property
    def elapsed_s(self) -> float:
        return now_s() - self.started_s

    @property
    def left_s(self) -> float:
        """Seconds left, never below zero; infinite where there is no deadline."""
        return float("inf") if self.timeout_s is None else max(0.0, self.timeout_s - self.elapsed_s)

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0.0


def pauses_s(first_s: float, longest_s: float, factor: float = 1.5) -> Iterator[float]:
    """Pauses between looks: growing from `first_s` to `longest_s`, for ever."""
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(longest_s, pause_s * factor)
