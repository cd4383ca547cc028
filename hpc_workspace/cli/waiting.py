"""What a command shows while it waits: one line that changes, with a clock, on a terminal; plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import click


class Waiting:
    """Shows, on stderr, what is waited for now and for how long. Leaves nothing on a terminal when it is over."""

    def __init__(self) -> None:
        self._line: Any = None
        self._task: Any = None

    def __enter__(self) -> Waiting:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}", markup=False)
            self._line = Progress(
                SpinnerColumn(), text, TimeElapsedColumn(), console=Console(stderr=True), transient=True
            )
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.stop()
            self._line = self._task = None

    def say(self, text: str) -> None:
        """From now on it is this that is waited for; its clock begins anew."""
        if self._line is None:
            click.echo(text, err=True)
            return
        if self._task is not None:
            self._line.remove_task(self._task)
        self._task = self._line.add_task(text, total=None)
