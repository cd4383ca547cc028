"""How a batch is shown while it runs: a table that changes on a terminal, a line now and then elsewhere; on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from hpc_workspace import clock
from hpc_workspace.cli.output import short_time

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_workspace.cli.batch_overview import Overview, PilotLine, TaskLine

_LINE_S = 10.0
# What the table has besides its pilots: headings, counts, slowest and latest tasks.
_OTHER_ROWS = 20
_FEWEST_PILOTS = 3
_ASIDE = 34


class Shown:
    """Shows one overview after the other."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._live: Any = None
        self._said = ""
        self._next = clock.Deadline(0.0)

    def __enter__(self) -> Shown:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def show(self, overview: Overview) -> None:
        """This is how it stands now."""
        if self._live is not None:
            height = self._live.console.height
            self._live.update(make_table(self._title, overview, pilots_max=max(_FEWEST_PILOTS, height - _OTHER_ROWS)))
        elif (line := as_line(overview)) != self._said and (self._next.is_over or not overview.open_tasks):
            self._said, self._next = line, clock.Deadline(_LINE_S)
            click.echo(line, err=True)


def as_line(overview: Overview) -> str:
    """All of it in one line."""
    working = sum(pilot.state == "running" for pilot in overview.pilots)
    queued = [pilot for pilot in overview.pilots if pilot.state == "queued"]
    parts = [f"{overview.finished}/{overview.tasks} tasks: {_counts(overview.counts)}"]
    if overview.failures:
        parts.append(f"failed as {_counts(overview.failures)}")
    if overview.open_tasks:
        why = f" ({queued[0].why})" if queued and queued[0].why else ""
        waiting = f", {len(queued)} queued{why}" if queued else ""
        parts.append(f"{working} pilot{'' if working == 1 else 's'}{waiting}")
        if overview.left_s is not None:
            parts.append(f"about {short_time(overview.left_s)} left")
    if overview.notice:
        parts.append(overview.notice)
    return "; ".join(parts)


def make_table(title: str, overview: Overview, *, pilots_max: int) -> Any:
    """What a terminal shows, for rich."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    share = f"{overview.finished}/{overview.tasks}  {100 * overview.finished // max(1, overview.tasks)} %"
    left = "" if not overview.open_tasks else f"  {_left(overview.left_s)}"
    top = Table.grid(padding=(0, 1), expand=True)
    top.add_column(ratio=1)
    top.add_column(no_wrap=True)
    top.add_row(ProgressBar(total=max(1, overview.tasks), completed=overview.finished), Text(share + left))
    parts: list[Any] = [Text(title, style="bold", no_wrap=True, overflow="ellipsis"), top]
    parts.append(Text(_counts(overview.counts, also_none=True)))
    if overview.failures:
        parts.append(Text(f"failed as: {_counts(overview.failures)}", style="red"))
    if overview.lost:
        parts.append(Text(f"attempts lost to the infrastructure: {_counts(overview.lost)}", style="yellow"))
    if overview.notice:
        parts.append(Text(overview.notice, style="yellow"))
    parts.append(_pilot_table(overview.pilots, pilots_max))
    for heading, lines in (("slowest", overview.slowest), ("latest", overview.latest)):
        if lines:
            parts.append(_task_table(heading, lines))
    return Group(*parts)


def _pilot_table(pilots: list[PilotLine], pilots_max: int) -> Any:
    from rich.text import Text

    # Of those that are gone only the bad news: they may be hundreds.
    shown = [one for one in pilots if one.state != "ended"]
    table = _plain_table("pilot", "state", "node", "slots", "for", "")
    for one in shown[:pilots_max]:
        slots = f"{one.busy}/{one.slots}" if one.state == "running" else ""
        cells = (one.name, one.state, one.node, slots, "" if one.since_s is None else short_time(one.since_s), one.why)
        table.add_row(*map(Text, cells))
    more = len(shown) - pilots_max
    over = len(pilots) - len(shown)
    words = [f"{more} more" if more > 0 else "", f"{over} ended in good order" if over else ""]
    if any(words):
        table.add_row(Text("; ".join(word for word in words if word), style="dim"))
    return table


def _task_table(heading: str, lines: list[TaskLine]) -> Any:
    from rich.text import Text

    table = _plain_table(heading, "attempt", "state", "for", "node")
    for one in lines:
        table.add_row(*map(Text, (one.task, str(one.attempt), one.state, f"{short_time(one.seconds)}", one.node)))
    return table


def _plain_table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        # The first column has names, which may be long; the last one words.
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=_ASIDE if not number else None)
    return table


def _counts(counts: Mapping[str, int], *, also_none: bool = False) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count or also_none)


def _left(left_s: float | None) -> str:
    return "" if left_s is None else f"about {short_time(left_s)} left"


__all__ = ["Shown", "as_line", "make_table"]
