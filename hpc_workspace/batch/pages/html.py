"""report.html: one page that needs no network and no script. Its text is escaped where it becomes markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpc_workspace.batch.outcomes import AGENT_CLASSES, INFRA_CLASSES
from hpc_workspace.batch.pages import charts, measures, style, tables, timeline, words
from hpc_workspace.batch.pages.markup import Markup, join, tag
from hpc_workspace.batch.pages.plots import TimeAxis
from hpc_workspace.batch.state import RunState

if TYPE_CHECKING:
    from hpc_workspace.batch.report import Report

# Were anything to get past the escaping: no script, no frame, nothing from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(report: Report, state: RunState, about: Mapping[str, Any]) -> str:
    """The whole page; well-formed as XML too."""
    name = str(about.get("started_by") or "batch run")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"Batch run: {name}"),
        tag("style", Markup(style.sheet())),
    )
    body = tag("body", *_top(report, state, about), *_plots(report, state, about), *_rest(state))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}"


def _top(report: Report, state: RunState, about: Mapping[str, Any]) -> Iterator[Markup]:
    yield tag("h1", "Batch run")
    yield tag("p", str(about.get("started_by") or ""), class_="soft")
    yield _verdict(tables.headline(report, state))
    yield _tiles(report)
    yield _all_tasks(report)
    pairs = (tag("div", tag("dt", name), tag("dd", value)) for name, value in tables.facts(report, state, about))
    yield tag("dl", *pairs)
    yield tag("h2", "Results")
    yield _table(tables.classes(report, state))
    if (found := tables.agent_results(report)) is not None:
        yield tag("h2", found.title)
        yield _table(found)


def _tiles(report: Report) -> Markup:
    done, final, missing = report.counts.get("done", 0), len(report.results), len(report.missing)
    decided = done + report.agent_failures
    score = f"{words.share(done, decided)} of {decided:,} that the agent had its chance at"
    loss = f"{words.share(report.infra_losses, final)} of {final:,} that ended"
    allowed = f"{words.share(report.max_infra_loss, 1)} allowed"
    tiles = [
        _tile("done", done, "done", score),
        _tile(
            "agent", report.agent_failures, "agent failures", f"{words.share(report.agent_failures, decided)} of these"
        ),
        _tile("lost", report.infra_losses, "lost to the infrastructure", f"{loss}; {allowed}"),
        _tile("running", missing, "not at an end", f"{words.share(missing, final + missing)} of {final + missing:,}"),
    ]
    return tag("div", *tiles, class_="tiles")


def _all_tasks(report: Report) -> Markup:
    """All tasks as one bar."""
    counts, missing = report.counts, len(report.missing)
    if not counts and not missing:
        return Markup("")
    names = ("done", *AGENT_CLASSES, *INFRA_CLASSES)
    parts = [(f"o-{name}", f"{name}: {counts.get(name, 0):,}", counts.get(name, 0)) for name in names]
    return charts.share_bar([*parts, ("life", f"not at an end: {missing:,}", missing)], "All tasks by class")


def _verdict(head: tables.Headline) -> Markup:
    reasons = tag("ul", *(tag("li", reason) for reason in head.reasons)) if head.reasons else ""
    return tag("div", tag("strong", head.verdict), reasons, class_="verdict good" if head.is_good else "verdict")


def _tile(style_name: str, value: int, name: str, note: str) -> Markup:
    return tag("div", tag("b", f"{value:,}"), name, tag("div", note, class_="note"), class_="tile",
               style=f"border-top-color: var(--{style_name})")  # fmt: skip


def _plots(report: Report, state: RunState, about: Mapping[str, Any]) -> Iterator[Markup]:
    line = timeline.make_timeline(state)
    yield tag("h2", "Pilots and slots over time")
    if line.lanes:
        yield from _timeline(report, line)
    else:
        yield tag("p", "No pilot has begun.", class_="soft")
    yield tag("h2", "Time per phase")
    yield from _phases(state)
    yield tag("h2", "Start times over the run")
    points = measures.starts(state)
    if line.lanes and points:
        chart = charts.start_times(points, TimeAxis(timeline.sessions(line)))
        yield _drawn(
            chart, "From asking for a sandbox until it can be used. Full line: median; dashed: 95th percentile."
        )
    else:
        yield tag("p", "No sandbox has come up.", class_="soft")
    limit = about.get("memory_bytes")
    for name, title, asked in (("memory_bytes", "Memory", limit), ("disk_bytes", "Disk", about.get("disk_bytes"))):
        yield tag("h2", f"{title}: peaks against what was asked")
        if values := measures.peaks(state, name):
            bound = asked if isinstance(asked, int) and asked > 0 else None
            no_bound = "" if bound else "No bound was asked for."
            yield _drawn(charts.histogram(values, bound, title.lower()), no_bound)
        else:
            yield tag("p", "None was recorded.", class_="soft")


def _timeline(report: Report, line: timeline.Timeline) -> Iterator[Markup]:
    axis = TimeAxis(timeline.sessions(line))
    known = line.busy_s + line.idle_s
    yield tag(
        "p",
        f"From {words.moment(line.begin_s)}, for {words.seconds(line.end_s - line.begin_s)}. "
        f"Slots worked for {words.share(line.busy_s, known)} of the {words.seconds(known)} of slot time that is known.",
    )
    if len(axis.spans) > 1:
        breaks = words.count(len(axis.spans) - 1, "long break")
        yield tag("p", f"{breaks} without any pilot left out of the time axis.", class_="note")
    yield tag("h3", "Slots at work, of those that there were")
    yield _drawn(charts.busy(line, axis))
    yield tag("h3", "Each slot")
    kinds = [name for name in measures.OUTCOMES if report.attempts.get(name) and name != "running"]
    items = [tag("span", _swatch(name), name) for name in kinds]
    items.append(tag("span", tag("span", class_="swatch", style="background: var(--life)"), "idle"))
    if any(lane.unrecorded for lane in line.lanes):
        items.append(tag("span", _HATCHED, "not known: under way, or lost without a record"))
    yield tag("div", *items, class_="legend")
    has_losses = any(name != "running" for lane in line.lanes for name in lane.unrecorded)
    yield _drawn(charts.gantt(line, axis), "A thick end with ✕: so many attempts went with the pilot." * has_losses)


_HATCHED = tag(
    "svg",
    tag("path", class_="hatch", d="M0 5L5 0M0 10L10 0M5 10L10 5"),
    xmlns="http://www.w3.org/2000/svg",
    viewBox="0 0 10 10",
)


def _phases(state: RunState) -> Iterator[Markup]:
    if spreads := measures.phase_spreads(state):
        items = [tag("span", tag("span", class_=f"swatch p-{name}"), name) for name in spreads]
        yield tag("div", *items, class_="legend")
        yield _drawn(charts.phase_bar(spreads))
        ours = {name: spread for name, spread in spreads.items() if name != "agent"}
        if ours and len(ours) < len(spreads):
            yield tag("p", "Without the agent: what the sandboxes cost.", class_="lead")
            yield _drawn(charts.phase_bar(ours))
    yield _table(tables.phases(state))


def _rest(state: RunState) -> Iterator[Markup]:
    for table in (tables.failures(state), tables.nodes(state), tables.slowest(state)):
        yield tag("h2", table.title)
        yield _table(table)


def _drawn(chart: charts.Chart, note: str = "") -> Markup:
    notes = " ".join(filter(None, (chart.note, note)))
    return tag("div", chart.drawing, tag("p", notes, class_="note") if notes else "", class_="drawn")


def _swatch(outcome: str) -> Markup:
    return tag("span", class_=f"swatch {charts.style_of(outcome)}")


def _table(table: tables.Table) -> Markup:
    note = tag("p", table.note, class_="note") if table.note else Markup("")
    if not table.rows:
        return join((tag("p", "Nothing.", class_="soft"), note))
    numbers = [title.startswith(">") for title in table.columns]
    heads = (
        tag("th", title.removeprefix(">"), class_="n" if is_number else None)
        for title, is_number in zip(table.columns, numbers, strict=True)
    )
    rows = (_row(row, numbers) for row in table.rows)
    grid = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    return join((tag("div", grid, class_="scroll"), note))


def _row(row: tables.Row, numbers: Sequence[bool]) -> Markup:
    if row.is_heading:
        return tag("tr", tag("td", _cell(row.cells[0]), colspan=str(len(numbers))), class_="group")
    cells = [
        tag("td", _cell(cell), _detail(row.detail) if index == 1 else "", class_="n" if is_number else None)
        for index, (cell, is_number) in enumerate(zip(row.cells, numbers, strict=True))
    ]
    return tag("tr", *cells)


def _cell(cell: tables.Cell | Sequence[tables.Cell]) -> Markup:
    if not isinstance(cell, tables.Cell):
        parts = [_cell(one) for one in cell]
        return join(part if index == 0 else join((", ", part)) for index, part in enumerate(parts))
    mark = _swatch(cell.outcome) if cell.outcome is not None else ""
    text = tag("a", cell.text, href=cell.link, title=cell.title) if cell.link is not None else cell.text
    return join((mark, text))


def _detail(text: str) -> Markup:
    if not text:
        return Markup("")
    shown = Markup("\n").join(join((line,)) for line in text.split("\n"))
    return tag("details", tag("summary", "more of the first one"), tag("pre", Markup(shown)))
