"""Which task next: many claimers over one directory, with few operations on it.

Each begins at a place of its own and goes on from there; when it meets a task that somebody else has, it lists the
claims once, and goes on in the middle of the largest gap. So claims that fail, and listings, grow with the number of
claimers and hardly with that of tasks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from hpc_workspace.batch.run_dir import RunDir


class Claimer:
    """Claims the first attempt of tasks for one pilot. Not for several threads.

    Attributes:
        listings, misses: how often it listed the claims, and met a task that was taken; for benchmarks.
    """

    def __init__(self, run: RunDir, pilot: str, task_ids: Sequence[str]) -> None:
        self._run = run
        self._pilot = pilot
        self._ids = list(task_ids)
        self._free: list[int] = []
        self._position = 0
        self._place = zlib.crc32(pilot.encode()) % len(self._ids) if self._ids else 0
        self.listings = self.misses = 0
        self._list()

    def next_fresh(self) -> str | None:
        """A task that nobody had, now this pilot's; None if there is none any more."""
        while self._free:
            index = self._free.pop(self._position)
            if self._position >= len(self._free):
                self._position = 0
            task_id = self._ids[index]
            if self._run.claim(task_id, 1, self._pilot):
                return task_id
            self.misses += 1
            self._place = index
            self._list(jump=True)
        return None

    def _list(self, *, jump: bool = False) -> None:
        """Learn what is free, and where to go on: behind `_place`, or in the middle of the largest gap."""
        self.listings += 1
        taken = self._run.claims()
        self._free = [index for index, task_id in enumerate(self._ids) if task_id not in taken]
        self._position = 0
        if jump:
            self._position = _middle_of_largest_gap(self._free)
        else:
            self._position = next((p for p, index in enumerate(self._free) if index >= self._place), 0)


def _middle_of_largest_gap(free: Sequence[int]) -> int:
    """The position, in a sorted list of numbers, of the middle of its longest run without a break."""
    best_start = best_length = start = 0
    for position in range(len(free)):
        if position and free[position] != free[position - 1] + 1:
            start = position
        if position - start + 1 > best_length:
            best_start, best_length = start, position - start + 1
    return best_start + best_length // 2 if best_length > 1 else best_start
