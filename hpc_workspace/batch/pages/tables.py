"""The report's words and tables, as values: the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hpc_workspace.batch.outcomes import AGENT_CLASSES, INFRA_CLASSES, Attempt, TaskState
from hpc_workspace.batch.pages import measures, words
from hpc_workspace.batch.state import RunState

if TYPE_CHECKING:
    from hpc_workspace.batch.report import Report

MEANINGS = {
    "done": "the agent returned",
    "agent": "the agent raised, or its process ended",
    "task_timeout": "it took longer than a task may",
    "image": "its image could not be had",
    "start": "its sandbox did not start",
    "lost": "its sandbox, or its pilot, was gone",
    "oom": "it used more memory than it had",
    "preempted": "Slurm gave the node to another",
    "node_fail": "the node failed",
    "time_limit": "the pilot's time was over",
    "cancelled": "the pilot was cancelled",
    "running": "under way",
}
_OPEN: Mapping[TaskState, str] = {
    "running": "under way",
    "retry": "wait for a further attempt",
    "waiting": "not begun",
}
_RETURNED = 12
_GROUPS = 6
_NODES = 20
_SLOWEST = 15


@dataclass(frozen=True)
class Cell:
    """A cell: text (not escaped), a link relative to the run's directory, and the outcome whose colour it has."""

    text: str
    link: str | None = None
    outcome: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Row:
    """Cells, or the heading of the rows below it. `detail` is longer text behind it, which may have lines."""

    cells: Sequence[Cell | Sequence[Cell]]
    is_heading: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: each column's title; a `>` before it: numbers, set to the right.
        note: what is to be known of it, such as what was left out.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """What a reader sees first. `reasons`: why the numbers are not to be trusted; none: they are."""

    verdict: str
    is_good: bool
    reasons: Sequence[str] = field(default=())


def headline(report: Report, state: RunState) -> Headline:
    """The verdict over a run."""
    total = len(report.results) + len(report.missing)
    if not total:
        return Headline("There are no tasks.", False)
    reasons = []
    if report.missing:
        states = [state.standings[name].state for name in report.missing]
        kinds = ", ".join(f"{states.count(kind):,} {kind}" for kind in _OPEN if kind in states)
        verb = "has" if len(report.missing) == 1 else "have"
        reasons.append(
            f"{len(report.missing):,} of {words.count(total, 'task')} {verb} not come to an end yet ({kinds})."
        )
    if report.infra_loss > report.max_infra_loss:
        reasons.append(
            f"{report.infra_losses:,} of the {words.count(len(report.results), 'task')} that ended "
            f"({words.share(report.infra_losses, len(report.results))}) stayed lost to the infrastructure; "
            f"{words.share(report.max_infra_loss, 1)} was allowed. The same command again tries them anew."
        )
    if reasons:
        return Headline("Not to be relied on yet" if report.missing else "Not to be relied on", False, reasons)
    return Headline("Complete, and to be relied on", True)


def facts(report: Report, state: RunState, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, in pairs of a name and its value."""
    found = [
        ("agent", str(about.get("started_by") or words.NONE)),
        ("last started", words.moment(float(about["started_at"])) if about.get("started_at") else words.NONE),
        ("pilots", f"{len(state.pilots):,} seen, {about.get('pilots', words.NONE)} wanted at a time"),
        ("workspaces per pilot", str(about.get("workspaces_per_pilot", words.NONE))),
        ("attempts", f"{sum(report.attempts.values()):,}, of them {report.attempts_lost:,} lost to the infrastructure"),
        ("time-out of a task", words.seconds(about.get("task_timeout_s")) if about.get("task_timeout_s") else "none"),
        ("memory of a workspace", words.size(about["memory_bytes"]) if about.get("memory_bytes") else "no bound"),
        ("loss allowed", words.share(report.max_infra_loss, 1)),
    ]
    if about.get("version"):
        found.append(("hpc-workspace", str(about["version"])))
    return found


def classes(report: Report, state: RunState) -> Table:
    """Tasks and attempts by class, each group of what is its own whole."""
    counts, attempts = report.counts, report.attempts
    decided = counts.get("done", 0) + report.agent_failures
    final, total = len(report.results), len(report.results) + len(report.missing)
    rows = [_heading(f"The agent's score: of {words.count(decided, 'task')} that it had its chance at")]
    rows += [_class_row(name, counts.get(name, 0), decided, attempts) for name in ("done", *AGENT_CLASSES)]
    rows.append(_heading(f"Lost to the infrastructure: of {words.count(final, 'task')} that ended"))
    rows += [
        _class_row(name, counts.get(name, 0), final, attempts)
        for name in INFRA_CLASSES
        if counts.get(name) or attempts.get(name)
    ]
    rows.append(_row("all of these", f"{report.infra_losses:,}", words.share(report.infra_losses, final),
                     f"{report.attempts_lost:,}", "attempts: most of them made good by a further one"))  # fmt: skip
    if report.missing:
        rows.append(_heading(f"Not at an end: of all {words.count(total, 'task')}"))
        states = [state.standings[name].state for name in report.missing]
        for kind, meaning in _OPEN.items():
            number = states.count(kind)
            tried = f"{attempts.get('running', 0):,}" if kind == "running" else ""
            mark = Cell(kind, outcome="running" if kind == "running" else None)
            rows.append(Row((mark, *_cells(f"{number:,}", words.share(number, total), tried, meaning))))
    columns = ("Class", ">Tasks", ">Share", ">Attempts", "What it means")
    note = "A task has the class of the attempt that counts: the first that is done, else the last."
    return Table("Results", columns, rows, note)


def _class_row(name: str, tasks: int, whole: int, attempts: Mapping[str, int]) -> Row:
    texts = (f"{tasks:,}", words.share(tasks, whole), f"{attempts.get(name, 0):,}", MEANINGS[name])
    return Row((Cell(name, outcome=name), *_cells(*texts)))


def agent_results(report: Report) -> Table | None:
    """What agents returned, where it can be counted; None where nothing can."""
    found, left_out = measures.returned(report.results, _RETURNED)
    if not found:
        return None
    rows = []
    for one in found:
        if one.true is not None:
            rows.append(
                _row(one.key, f"{one.count:,}", f"{one.true:,} true ({words.share(one.true, one.count)})", "", "")
            )
        elif one.spread is not None and one.mean is not None:
            numbers = (f"{value:.4g}" for value in (one.mean, one.spread.median, one.spread.largest))
            rows.append(_row(one.key, f"{one.count:,}", *numbers))
    note = f"{words.count(left_out, 'further key')} left out." if left_out else ""
    return Table("What the agent returned", ("Key", ">Tasks", ">True, or mean", ">Median", ">Largest"), rows,
                 f"Of tasks that are done; yes-or-no and numbers alone. {note}".strip())  # fmt: skip


def phases(state: RunState) -> Table:
    """How long each phase took."""
    rows = [_phase_row(name, spread) for name, spread in measures.phase_spreads(state).items()]
    whole = measures.Spread.of([record.duration_s for record in measures.every_record(state)])
    if whole is not None:
        rows.append(_phase_row("whole attempt", whole))
    note = (
        "Of attempts with a record that came to the phase. The phase close is all that comes after the agent: "
        "its files are kept, the sandbox is closed."
    )
    columns = ("Phase", ">Attempts", ">Median", ">95th percentile", ">Longest", ">Together")
    return Table("Time per phase", columns, rows, note)


def _phase_row(name: str, spread: measures.Spread) -> Row:
    times = map(words.seconds, (spread.median, spread.p95, spread.largest, spread.total))
    return _row(name, f"{spread.count:,}", *times)


def failures(state: RunState) -> Table:
    """Failed attempts by class, and within it by what was wrong."""
    rows: list[Row] = []
    for name, found in measures.failures(state).items():
        total = sum(one.count for one in found)
        meaning = MEANINGS.get(name, "no class that is known")
        title = f"{name}: {words.count(total, 'attempt')}, {meaning}"
        rows.append(Row((Cell(title, outcome=name),), is_heading=True))
        rows += [_failure_row(one) for one in found[:_GROUPS]]
        if rest := found[_GROUPS:]:
            count = sum(one.count for one in rest)
            kinds = words.count(len(rest), "further kind")
            rows.append(_row(f"{count:,}", f"{kinds} of error in {words.count(count, 'attempt')}", "in attempts/"))
    return Table("Failures", (">Attempts", "Error, its last line", "Logs"), rows)


def _failure_row(failure: measures.Failure) -> Row:
    links = [_attempt_link(task_id, attempt) for task_id, attempt in failure.examples]
    if failure.count > len(links):
        links.append(Cell(f"and {failure.count - len(links):,} more"))
    record = failure.examples[0][1].record
    detail = record.error[-_DETAIL:] if record is not None and "\n" in record.error.strip() else ""
    return Row((Cell(f"{failure.count:,}"), Cell(failure.line), links), detail=detail)


_DETAIL = 1500


def attempt_log(task_id: str, number: int) -> str:
    """Where an attempt's log is, from the run's directory."""
    return f"attempts/{quote(task_id, safe='')}/{number}/agent.log"


def _attempt_link(task_id: str, attempt: Attempt) -> Cell:
    title = f"attempt {attempt.number} on pilot {attempt.pilot}"
    return Cell(f"{task_id}/{attempt.number}", attempt_log(task_id, attempt.number), title=title)


def nodes(state: RunState) -> Table:
    """What happened on each node."""
    found = measures.nodes(state)
    rows = []
    for name, seen in list(found.items())[:_NODES]:
        spread = measures.Spread.of(seen.starts_s)
        times = (spread.median, spread.p95) if spread is not None else (None, None)
        lost = (f"{seen.lost:,}", words.share(seen.lost, seen.attempts))
        rows.append(_row(name, f"{seen.attempts:,}", *lost, *map(words.seconds, times)))
    left_out = len(found) - len(rows)
    note = f"{words.count(left_out, 'node')} that lost fewer left out." if left_out else ""
    columns = ("Node", ">Attempts", ">Lost to the infrastructure", ">Share", ">Start, median", ">95th percentile")
    return Table("Nodes", columns, rows, note)


def slowest(state: RunState) -> Table:
    """The attempts that took longest."""
    rows = []
    for record in measures.slowest(state, _SLOWEST):
        link = Cell(f"{record.task}/{record.attempt}", attempt_log(record.task, record.attempt))
        name = record.failure_class or "done"
        times = map(words.seconds, (record.duration_s, record.phases_s.get("start"), record.agent_s))
        rows.append(Row((link, Cell(name, outcome=name), *_cells(*times, record.node, record.pilot))))
    return Table("Slowest attempts", ("Task", "Outcome", ">Whole", ">Start", ">Agent", "Node", "Pilot"), rows)


def all_tables(report: Report, state: RunState) -> Iterator[Table]:
    """Every table, in order."""
    yield classes(report, state)
    if (found := agent_results(report)) is not None:
        yield found
    yield phases(state)
    yield failures(state)
    yield nodes(state)
    yield slowest(state)


def _heading(text: str) -> Row:
    return Row((Cell(text),), is_heading=True)


def _cells(*texts: str) -> tuple[Cell, ...]:
    return tuple(map(Cell, texts))


def _row(*texts: str) -> Row:
    return Row(_cells(*texts))
