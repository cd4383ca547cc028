"""All rows, in the order of the table."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from benchmarks.harness.rows import bulk, commands, memory, programs, routes, starts
from benchmarks.harness.values import Node, Row

ROWS: tuple[Row, ...] = (*commands.ROWS, *routes.ROWS, *bulk.ROWS, *memory.ROWS, *programs.ROWS, *starts.ROWS)


def choose(patterns: Sequence[str] = (), node: Node | None = None) -> list[Row]:
    """The rows whose names match one of the shell patterns (none: all rows), of one node or of all."""
    return [
        row
        for row in ROWS
        if node in (None, row.node)
        and (not patterns or any(fnmatch.fnmatch(row.name, pattern) for pattern in patterns))
    ]
