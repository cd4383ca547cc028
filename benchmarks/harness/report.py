"""What came of a run: a document, its schema (`schema.json` is made from the classes here), and a Markdown table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.harness.rounds import Measured
from benchmarks.harness.values import Goal, Role, Row, Unit

SCHEMA_VERSION: Literal[1] = 1
SCHEMA_FILE = Path(__file__).with_name("schema.json")
Verdict = Literal["reached", "lost", "not measured"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Summary(_Value):
    """Of the rounds: how many, their median, and the 5th and 95th percentile (of few rounds: least and most)."""

    n: int
    median: float
    p5: float
    p95: float


class ContestantReport(_Value):
    """One contestant: its figures in the row's unit, or why there are none."""

    name: str
    role: Role
    figures: Summary | None
    not_measured: str | None


class GoalReport(_Value):
    """One goal: in words, what was measured of it round by round, and whether it was reached."""

    text: str
    kind: Literal["figure", "ratio", "difference"]
    against: str | None
    bound: float
    figures: Summary | None
    verdict: Verdict


class RowReport(_Value):
    """One row. `samples` are by contestant, in the order of the rounds. `profile` is kept where a goal was lost."""

    name: str
    what: str
    unit: Unit
    node: str
    load_1min: float
    contestants: list[ContestantReport]
    goals: list[GoalReport]
    samples: dict[str, list[float]]
    profile: str | None


class Machine(_Value):
    """What it was measured on."""

    cpus: int
    cpu_model: str
    memory_gib: float
    kernel: str
    versions: dict[str, str]


class Report(_Value):
    """One run: began (UTC, ISO 8601), how long it took, on what, and its rows."""

    schema_version: Literal[1]
    began_at: str
    took_s: float
    machine: Machine
    rows: list[RowReport]


def schema() -> dict[str, object]:
    """The JSON schema of `Report`, as `schema.json` holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}


def summarize(values: Sequence[float]) -> Summary:
    """Median and spread of at least one value."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Summary(
        n=len(ordered),
        median=statistics.median(ordered),
        p5=ordered[round(0.05 * last)],
        p95=ordered[round(0.95 * last)],
    )


def judge(measured: Measured, goal: Goal) -> GoalReport:
    """Whether the median of what the goal is for keeps its bound."""
    figures = measured.figures(goal)
    verdict: Verdict = "not measured"
    if figures:
        median = statistics.median(figures)
        is_reached = median >= goal.bound if measured.row.is_more_better else median <= goal.bound
        verdict = "reached" if is_reached else "lost"
    return GoalReport(
        text=measured.row.describe(goal),
        kind=goal.kind,
        against=goal.against,
        bound=goal.bound,
        figures=summarize(figures) if figures else None,
        verdict=verdict,
    )


def is_lost(measured: Measured) -> bool:
    """Whether a goal of the row was not reached."""
    return any(judge(measured, goal).verdict == "lost" for goal in measured.row.goals)


def row_report(measured: Measured) -> RowReport:
    """A row, judged."""
    row = measured.row
    return RowReport(
        name=row.name,
        what=row.what,
        unit=row.unit,
        node=row.node,
        load_1min=measured.load,
        contestants=[
            ContestantReport(
                name=contestant.name,
                role=contestant.role,
                figures=summarize(measured.samples[contestant.name]) if contestant.name in measured.samples else None,
                not_measured=measured.absent.get(contestant.name),
            )
            for contestant in row.contestants
        ],
        goals=[judge(measured, goal) for goal in row.goals],
        samples=measured.samples,
        profile=measured.profile or None,
    )


def unmeasured(row: Row, reason: str) -> RowReport:
    """A row of which nothing was measured."""
    return row_report(Measured(row, absent={contestant.name: reason for contestant in row.contestants}))


def read_node_report(lines: Iterable[str], wanted: Sequence[Row], ended: str) -> tuple[list[RowReport], Machine | None]:
    """What a node's run has told, a JSON object a line; the rows that it did not come to are told as that.

    Args:
        ended: how the run ended, for those.
    """
    told: dict[str, RowReport] = {}
    machine = None
    for line in lines:
        if line.startswith('{"name"'):
            row = RowReport.model_validate_json(line)
            told[row.name] = row
        else:
            machine = Machine.model_validate_json(line)
    return [told.get(row.name) or unmeasured(row, ended) for row in wanted], machine


def merge_machines(machines: Sequence[Machine]) -> Machine:
    """Nodes of one machine: what they have between them."""
    versions = {name: value for machine in machines for name, value in machine.versions.items()}
    return machines[0].model_copy(update={"versions": versions})


def to_markdown(report: Report, *, profiles: str) -> str:
    """The table, with a line about the machine above it, and below it what was lost.

    Args:
        profiles: where the profiles of lost rows are, as the reader is told: `PROFILES/ROW.txt`.
    """
    machine = report.machine
    versions = ", ".join(f"{name} {value}" for name, value in sorted(machine.versions.items()))
    loads = [row.load_1min for row in report.rows]
    lines = [
        f"{report.began_at}, {report.took_s:.0f} s; {machine.cpus} CPUs ({machine.cpu_model}), "
        f"{machine.memory_gib:.0f} GiB, Linux {machine.kernel}; {versions}. "
        f"Load of one minute as the rows began: {min(loads):.1f} to {max(loads):.1f}."
        if loads
        else "No row.",
        "",
        "Median (5th to 95th percentile), n rounds.",
        "",
        "| row | ours | goals | floor | peers |",
        "|---|---|---|---|---|",
        *(_line(row) for row in report.rows),
        "",
    ]
    lost = [row for row in report.rows if any(goal.verdict == "lost" for goal in row.goals)]
    lines += [f"Lost: `{row.name}`; the profile is in `{profiles}/{row.name}.txt`." for row in lost]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: RowReport) -> str:
    ours = [c for c in row.contestants if c.role == "ours"]
    cells = [
        f"`{row.name}`: {row.what}",
        _cell(ours, row.unit, is_named=False),
        "<br>".join(_goal_text(goal, row.unit) for goal in row.goals) or "none set",
        _cell([c for c in row.contestants if c.role == "floor"], row.unit),
        _cell([c for c in row.contestants if c.role == "peer"], row.unit),
    ]
    return f"| {' | '.join(cells)} |"


def _cell(contestants: Iterable[ContestantReport], unit: str, *, is_named: bool = True) -> str:
    parts = []
    for contestant in contestants:
        name = f"{contestant.name}: " if is_named else ""
        if contestant.figures is None:
            parts.append(f"{name}not measured: {_in_cell(contestant.not_measured or '')}")
        else:
            n = "" if is_named else f", n {contestant.figures.n}"
            parts.append(f"{name}{_spread(contestant.figures, unit)}{n}")
    return "<br>".join(parts) or "none"


def _goal_text(goal: GoalReport, unit: str) -> str:
    verdict = f"**{goal.verdict}**" if goal.verdict == "lost" else goal.verdict
    if goal.kind == "figure" or goal.figures is None:
        return f"{goal.text}: {verdict}"
    return f"{goal.text}: {_spread(goal.figures, unit if goal.kind == 'difference' else '')}, {verdict}"


def _spread(figures: Summary, unit: str) -> str:
    return f"{_number(figures.median)}{' ' * bool(unit)}{unit} ({_number(figures.p5)} to {_number(figures.p95)})"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _in_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write the schema anew: `python -m benchmarks.harness.report`."""
    SCHEMA_FILE.write_text(json.dumps(schema(), indent=2) + "\n")


if __name__ == "__main__":
    main()
