"""The parts that plots are made of: scales, axes with round marks, and places on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hpc_workspace.batch.pages import words
from hpc_workspace.batch.pages.markup import Markup, tag
from hpc_workspace.batch.pages.timeline import Span

WIDTH = 960.0
LEFT = 150.0
RIGHT = 16.0
_BREAK = 18.0
_TIME_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def round_step(span: float, marks: int) -> float:
    """A distance of 1, 2 or 5 times a power of ten, such that about `marks` of them make `span`."""
    if span <= 0 or not math.isfinite(span):
        return 1.0
    raw = span / marks
    power = 10.0 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999)


@dataclass(frozen=True)
class TimeAxis:
    """Time to the right, over the sessions of a run; what is between them is cut out."""

    spans: list[Span]
    left: float = LEFT
    right: float = WIDTH - RIGHT

    @property
    def _scale(self) -> float:
        room = self.right - self.left - _BREAK * (len(self.spans) - 1)
        return room / sum(end - begin for begin, end in self.spans)

    def starts(self) -> Iterable[tuple[float, Span]]:
        """Where each session begins, in pixels."""
        x, scale = self.left, self._scale
        for begin, end in self.spans:
            yield x, (begin, end)
            x += (end - begin) * scale + _BREAK

    def x(self, moment: float) -> float:
        """Where a moment is; one outside of every session is at the border of the nearest before it."""
        scale, found = self._scale, self.left
        for x, (begin, end) in self.starts():
            if moment < begin:
                break
            found = x + (min(moment, end) - begin) * scale
        return found

    def draw(self, top: float, bottom: float) -> Iterable[Markup]:
        """Lines and labels, and a gap for each break."""
        origin = self.spans[0][0]
        whole = sum(end - begin for begin, end in self.spans)
        step = next((s for s in _TIME_STEPS_S if whole / s <= 9), math.ceil(whole / 9 / 86400) * 86400)
        labelled = -math.inf
        for index, (x, (begin, end)) in enumerate(self.starts()):
            if index:
                yield tag("rect", class_="gap", x=x - _BREAK + 3, y=top, width=_BREAK - 6, height=bottom - top)
            first = math.ceil((begin - origin) / step - 1e-9)
            for mark in range(first, math.floor((end - origin) / step) + 1):
                at = self.x(origin + mark * step)
                yield tag("line", class_="grid", x1=at, y1=top, x2=at, y2=bottom)
                if at - labelled >= 64:
                    labelled = at
                    label = words.offset(mark * step, step)
                    yield tag("text", label, class_="mark", x=at, y=bottom + 15, text_anchor="middle")


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `stop`; by their logarithms where `is_log`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Where a value is; one outside is at the border."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.stop - self.start)

    def marks(self) -> list[float]:
        """Round values on it, its ends among them where they are round."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**power for power in powers for step in (1, 2, 5)]
            inside = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            return inside if len(inside) <= 7 else [value for value in inside if f"{value:e}".startswith("1.0")]
        step = round_step(self.high - self.low, 4)
        return [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step * 1.0001) + 1)]


def upright(scale: Scale, label: Callable[[float], str], left: float, right: float) -> Iterable[Markup]:
    """A vertical axis: a line across and a label for each round value."""
    for value in scale.marks():
        y = scale.at(value)
        yield tag("line", class_="grid", x1=left, y1=y, x2=right, y2=y)
        yield tag("text", label(value), class_="mark", x=left - 8, y=y + 4, text_anchor="end")


def drawing(height: float, title: str, *parts: str) -> Markup:
    """A drawing as wide as the page; `title` says in words what is to be seen."""
    return tag(
        "svg",
        tag("title", title),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        role="img",
        class_="plot",
    )
