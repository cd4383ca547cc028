"""What a command in a workspace prints and how it ended, as this process's own output and exit code."""

from __future__ import annotations

import os
import select
import shlex
import sys
from typing import TYPE_CHECKING

import click

from hpc_workspace.cli import EXIT_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_workspace.results import CommandResult, OutputChunk


def as_line(command: tuple[str, ...]) -> str:
    """One argument is a line of shell; several are one program with its arguments."""
    return command[0] if len(command) == 1 else shlex.join(command)


def print_stream(items: Iterator[OutputChunk | CommandResult]) -> int:
    """Print a command's output as it comes. Returns the exit code for this process."""
    from hpc_workspace.results import CommandResult

    code = 0
    for item in items:
        if isinstance(item, CommandResult):
            code = EXIT_TIMEOUT if item.timeout_occurred else shell_code(item.exit_code)
            if item.timeout_occurred:
                click.echo("hpc-workspace: the command ran longer than its --timeout", err=True)
        else:
            out = sys.stdout.buffer if item.stream == "stdout" else sys.stderr.buffer
            out.write(item.data)
            out.flush()
    return code


def shell_code(exit_code: int) -> int:
    """A process's exit code for a command's: 128 + N for signal N, as shells do."""
    return exit_code if exit_code >= 0 else 128 - exit_code


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, also where somebody else made the descriptor one that does not block."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


def short_time(seconds: float | None) -> str:
    """A time for a narrow column: 42s, 17m, 3h05m, 2d04h; `-` where it is not known."""
    if seconds is None:
        return "-"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 60:
        return f"{max(0.0, seconds):.0f}s"
    if minutes < 60:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"
