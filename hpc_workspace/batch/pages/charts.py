"""The report's drawings. Each is bounded in size whatever the run's, and says in its note what it leaves out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpc_workspace.batch.pages import measures, tables, words
from hpc_workspace.batch.pages.markup import Markup, join, number, shorten, tag
from hpc_workspace.batch.pages.plots import LEFT, RIGHT, WIDTH, Scale, TimeAxis, drawing, upright
from hpc_workspace.batch.pages.timeline import Bar, Lane, Slots, Span, Timeline, slots_over_time

# More bars than these are drawn as one path for each row and outcome, without a name and a link for each.
_NAMED_BARS = 1000
_ROWS = 64
_COLUMN = 2.0
_GAPS = 0.6


@dataclass(frozen=True)
class Chart:
    """A drawing, and what is to be known of it."""

    drawing: Markup
    note: str = ""


def style_of(outcome: str) -> str:
    """The style class of an outcome's colour; that of `lost` for a word that nobody knows."""
    return f"o-{outcome}" if outcome in measures.OUTCOMES else "o-lost"


def share_bar(parts: Sequence[tuple[str, str, float]], title: str) -> Markup:
    """One bar of the whole width, in parts: a style class, what it is, how much."""
    whole = sum(amount for _, _, amount in parts)
    shapes, x = [], 0.0
    for style, name, amount in parts:
        if amount <= 0:
            continue
        width = WIDTH * amount / whole
        shape = tag("rect", tag("title", name), class_=style, x=x, y=0, width=max(0.5, width - 1.5), height=26, rx=2)
        shapes.append(shape)
        x += width
    return drawing(26, title, *shapes)


# The timeline.


def gantt(timeline: Timeline, axis: TimeAxis) -> Chart:
    """A row for each slot, a bar for each attempt, in the colour of how it ended."""
    lanes, left_out = _fitting(timeline.lanes)
    rows = sum(_rows_of(lane) for lane in lanes)
    bars = sum(len(slot) for lane in lanes for slot in lane.slots[: _rows_of(lane)])
    height = 16.0 if rows <= 24 else 11.0 if rows <= 48 else 9.0
    is_named = bars <= _NAMED_BARS
    parts: list[Markup] = []
    y = 8.0
    for lane in lanes:
        parts.append(_lane(lane, axis, y, height, is_named))
        y += _rows_of(lane) * height + 7
    bottom = y
    grid = join(axis.draw(2, bottom))
    notes = []
    if left_out:
        shown = f"{rows:,} of {sum(len(lane.slots) for lane in timeline.lanes):,} slots"
        notes.append(f"{shown} are shown, of pilots evenly over the run; the plot above counts all.")
    if not is_named:
        notes.append(
            f"{bars:,} attempts in columns of {_COLUMN:g} pixels: "
            "where several fall into one, the one that failed is shown."
        )
    title = f"{words.count(len(timeline.lanes), 'pilot')} and their slots over time"
    return Chart(drawing(bottom + 24, title, _hatch("hatch-slots"), grid, *parts), " ".join(notes))


def _hatch(name: str) -> Markup:
    """The pattern of what is not known. A name is there once in a page."""
    lines = tag("path", class_="hatch", d="M0 6L6 0")
    return tag("defs", tag("pattern", lines, id=name, width=6, height=6, patternUnits="userSpaceOnUse"))


def _rows_of(lane: Lane) -> int:
    return min(len(lane.slots), _ROWS)


def _fitting(lanes: Sequence[Lane]) -> tuple[list[Lane], bool]:
    """As many pilots as there is room for, evenly over the run; and whether any slot is left out."""
    count = len(lanes)
    chosen = list(lanes)
    while sum(map(_rows_of, chosen)) > _ROWS and count > 1:
        count = max(1, min(count - 1, count * _ROWS // sum(map(_rows_of, chosen))))
        chosen = [lanes[index * len(lanes) // count] for index in range(count)]
    return chosen, sum(map(_rows_of, chosen)) < sum(len(lane.slots) for lane in lanes)


def _lane(lane: Lane, axis: TimeAxis, top: float, height: float, is_named: bool) -> Markup:
    rows = _rows_of(lane)
    left, right = axis.x(lane.begin_s), axis.x(lane.end_s)
    lost = {name: count for name, count in lane.unrecorded.items() if name != "running"}
    said = [f"pilot {lane.name}", lane.node, lane.word or "at work"]
    said += [f"{count:,} without a record: {name}" for name, count in lane.unrecorded.items()]
    shapes = [
        tag("title", ", ".join(filter(None, said))),
        tag("text", shorten(lane.name, 18), class_="name", x=LEFT - 12, y=top + 11, text_anchor="end"),
    ]
    if rows > 1 and lane.node:
        shapes.append(
            tag("text", shorten(lane.node, 20), class_="mark", x=LEFT - 12, y=top + 11 + 13, text_anchor="end")
        )
    shapes.append(tag("rect", class_="life", x=left, y=top, width=max(1.0, right - left), height=rows * height, rx=2))
    for index, (bars, tail) in enumerate(zip(lane.slots[:rows], lane.tails(), strict=False)):
        y = top + index * height
        if tail is not None:
            x = axis.x(tail[0])
            width = max(1.0, axis.x(tail[1]) - x)
            shapes.append(
                tag("rect", class_="unknown", x=x, y=y + 1, width=width, height=height - 2, fill="url(#hatch-slots)")
            )
        shapes += _named_bars(bars, axis, y, height) if is_named else _merged_bars(bars, axis, y, height)
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        style = f"end {style_of(worst)}"
        shapes.append(tag("rect", class_=style, x=right - 1.5, y=top - 2, width=3, height=rows * height + 4))
        count = f"{sum(lost.values())} ✕"
        has_room = right + 34 < WIDTH
        shapes.append(
            tag("text", count, class_="name", x=right + 5 if has_room else right - 5, y=top + rows * height / 2 + 4,
                text_anchor="start" if has_room else "end")
        )  # fmt: skip
    return tag("g", *shapes)


def _named_bars(bars: Sequence[Bar], axis: TimeAxis, y: float, height: float) -> Iterator[Markup]:
    for bar in bars:
        x = axis.x(bar.begin_s)
        width = max(1.0, axis.x(bar.end_s) - x - _GAPS)
        said = f"{bar.task}, attempt {bar.number}: {bar.outcome}, {words.seconds(bar.end_s - bar.begin_s)}"
        place = {"x": x, "y": y + 1.0, "width": width, "height": height - 2}
        shape = tag("rect", tag("title", said), class_=style_of(bar.outcome), **place)
        yield tag("a", shape, href=tables.attempt_log(bar.task, bar.number))


def _merged_bars(bars: Sequence[Bar], axis: TimeAxis, y: float, height: float) -> Iterator[Markup]:
    """One path for each outcome, in columns: where several bars fall into one, what failed is shown."""
    columns: dict[int, str] = {}
    for bar in bars:
        first = int(axis.x(bar.begin_s) / _COLUMN)
        for column in range(first, max(first + 1, int(axis.x(bar.end_s) / _COLUMN))):
            if columns.get(column, "done") == "done":
                columns[column] = bar.outcome
    runs: dict[str, list[list[int]]] = defaultdict(list)
    for column in sorted(columns):
        found = runs[style_of(columns[column])]
        if found and found[-1][1] == column:
            found[-1][1] = column + 1
        else:
            found.append([column, column + 1])
    for style, found in runs.items():
        up = number(height - 2)
        path = "".join(
            f"M{number(a * _COLUMN)} {number(y + 1)}h{number((b - a) * _COLUMN)}v{up}H{number(a * _COLUMN)}z"
            for a, b in found
        )
        yield tag("path", class_=style, d=path)


def busy(timeline: Timeline, axis: TimeAxis) -> Chart:
    """How many slots there were, how many worked on what has a record, and of how many that is not known."""
    top, bottom = 10.0, 120.0
    found = [(x, axis.x(end), _means(timeline, (begin, end), x, axis.x(end))) for x, (begin, end) in axis.starts()]
    highest = max((one.had for _, _, means in found for one in means), default=0.0)
    scale = Scale(0, max(1.0, highest), bottom, top)
    parts = [_hatch("hatch-busy"), *axis.draw(top, bottom), *upright(scale, _whole, LEFT, WIDTH - RIGHT)]
    for left, right, means in found:
        for style, fill, heights in (
            ("had", None, [one.had for one in means]),
            ("unknown", "url(#hatch-busy)", [one.busy + one.unknown for one in means]),
            ("busy", None, [one.busy for one in means]),
        ):
            width = (right - left) / len(means)
            steps = "".join(
                f"V{number(scale.at(value))}H{number(left + width * (index + 1))}"
                for index, value in enumerate(heights)
            )
            path = f"M{number(left)} {number(bottom)}{steps}V{number(bottom)}z"
            parts.append(tag("path", class_=style, fill=fill, d=path))
    return Chart(drawing(bottom + 24, "Slots that worked, of those that there were, over time", *parts))


def _means(timeline: Timeline, span: Span, left: float, right: float) -> list[Slots]:
    """One for every two columns of the drawing, about."""
    return slots_over_time(timeline, *span, max(2, round((right - left) / (2 * _COLUMN))))


# Starts and peaks.


def start_times(points: Sequence[tuple[float, float]], axis: TimeAxis) -> Chart:
    """When each sandbox was begun, and how long it took to come up; with the median and the 95th percentile."""
    top, bottom = 10.0, 240.0
    longest = max(taken for _, taken in points)
    shortest = max(0.01, min(taken for _, taken in points))
    is_log = longest > 20 * shortest
    low, high = (shortest / 1.3, longest * 1.3) if is_log else (0.0, max(longest * 1.05, 0.01))
    scale = Scale(low, high, bottom, top, is_log)
    # On a grid of a pixel each: what falls on the same place is drawn once.
    places = sorted({(round(axis.x(at)), round(scale.at(max(taken, low)))) for at, taken in points})
    dots = "".join(f"M{x} {y}h0" for x, y in places[:: max(1, -(-len(places) // _DOTS))])
    parts = [*axis.draw(top, bottom), *upright(scale, words.mark_s, LEFT, WIDTH - RIGHT)]
    parts.append(tag("path", class_="dots", d=dots))
    for style, part in (("median", 0.5), ("p95", 0.95)):
        trend = [(axis.x(at), scale.at(max(low, taken))) for at, taken in _trend(points, part)]
        if len(trend) > 1:
            line = " ".join(f"{number(x)},{number(y)}" for x, y in trend)
            parts.append(tag("polyline", class_=style, points=line))
    note = f"{words.count(len(points), 'start')}"
    if len(places) > _DOTS:
        note += f"; every {-(-len(places) // _DOTS)}th dot is drawn"
    elif len(places) < len(points):
        note += "; those on the same place are one dot"
    return Chart(drawing(bottom + 24, "How long each sandbox took to start, over the run", *parts), note + ".")


_DOTS = 8000
_TREND = 24
# Of fewer, the 95th percentile is the largest.
_GROUP = 25


def _trend(points: Sequence[tuple[float, float]], part: float) -> Iterator[tuple[float, float]]:
    """A quantile of groups of as many points each, in order of time, at the middle one's time."""
    count = min(_TREND, len(points) // _GROUP)
    for index in range(count):
        group = points[index * len(points) // count : (index + 1) * len(points) // count]
        yield group[len(group) // 2][0], measures.quantile(sorted(taken for _, taken in group), part)


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else ""


# No names to the left of it.
_NARROW = 60.0


def histogram(values: Sequence[int], limit: int | None, name: str) -> Chart:
    """How many attempts used how much at most; with what was asked for as a line."""
    top, bottom, bins = 24.0, 190.0, 40
    highest = max([*values, limit or 0]) * 1.04 or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(value / highest * bins))] += 1
    across = Scale(0, highest, _NARROW, WIDTH - RIGHT)
    upwards = Scale(0, max(counts), bottom, top)
    parts = list(upright(upwards, _whole, _NARROW, WIDTH - RIGHT))
    step = 2.0 ** math.ceil(math.log2(highest / 8))  # sizes are round by powers of two
    for index in range(int(highest / step) + 1):
        at = across.at(index * step)
        parts.append(tag("text", words.size(index * step), class_="mark", x=at, y=bottom + 15, text_anchor="middle"))
    width = (WIDTH - RIGHT - _NARROW) / bins
    for index, count in enumerate(counts):
        if count:
            y = min(bottom - 1.5, upwards.at(count))
            low, high = index * highest / bins, (index + 1) * highest / bins
            said = f"{words.count(count, 'attempt')}: {words.size(low)} to {words.size(high)}"
            is_over = limit is not None and high > limit
            place = {"x": _NARROW + index * width + 0.5, "y": y, "width": width - 1, "height": bottom - y}
            parts.append(tag("rect", tag("title", said), class_="o-oom" if is_over else "o-done", **place))
    if limit is not None:
        at = across.at(limit)
        parts.append(tag("line", class_="limit", x1=at, y1=top - 6, x2=at, y2=bottom))
        is_right = at > WIDTH - 160
        words_at = {"x": at - 6 if is_right else at + 6, "y": top - 2}
        asked = f"asked for: {words.size(limit)}"
        parts.append(tag("text", asked, class_="name", text_anchor="end" if is_right else "start", **words_at))
    spread = measures.Spread.of(values)
    note = ""
    if spread is not None:
        note = (
            f"{words.count(spread.count, 'attempt')}: median {words.size(spread.median)}, "
            f"95th percentile {words.size(spread.p95)}, largest {words.size(spread.largest)}."
        )
    return Chart(drawing(bottom + 24, f"Peaks of {name} of all attempts", *parts), note)


def phase_bar(spreads: Mapping[str, measures.Spread]) -> Chart:
    """Where the time of all attempts went, as far as these phases had it."""
    whole = sum(spread.total for spread in spreads.values())
    parts = [
        (f"p-{name}", f"{name}: {words.seconds(spread.total)}, {words.share(spread.total, whole)}", spread.total)
        for name, spread in spreads.items()
    ]
    legend = ", ".join(f"{name} {words.share(spread.total, whole)}" for name, spread in spreads.items())
    return Chart(share_bar(parts, f"Where the time went: {legend}"), f"{words.seconds(whole)} together: {legend}.")
