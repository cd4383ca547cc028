"""Quantities for people."""

from __future__ import annotations

from datetime import UTC, datetime

NONE = "\u2013"


def seconds(value: float | None) -> str:
    """A duration in the unit that fits: `0.35 s`, `12 s`, `4.5 min`, `2.1 h`; a dash if there is none."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.2f} s"
    if value < 100:
        return f"{value:.0f} s"
    if value < 100 * 60:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h"


def mark_s(value: float) -> str:
    """A duration at an axis' mark: `0.5 s`, `5 s`, `10 min`, `2 h`."""
    if value < 60:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 3600 else f"{value / 3600:.3g} h"


def share(part: float, whole: float) -> str:
    """`12.5 %`; a dash of nothing. Never rounded to none or all of it."""
    if not whole:
        return NONE
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.1f} %"


def size(count: float) -> str:
    """Bytes in powers of 1024, as sizes are asked for: `512 MiB`, `3.6 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count == int(count) else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def count(value: int, one: str, many: str | None = None) -> str:
    """`1 task`, `12,000 tasks`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def moment(wall_s: float) -> str:
    """A date and time in UTC; a dash for what is none."""
    try:
        return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return NONE


def offset(value_s: float, step_s: float) -> str:
    """A place on a time axis whose marks are `step_s` apart, counted from its beginning."""
    if not value_s:
        return "0"
    if step_s < 60:
        minutes, rest = divmod(round(value_s), 60)
        return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
    if step_s < 3600:
        hours, minutes = divmod(round(value_s / 60), 60)
        return f"{hours}:{minutes:02d} h" if hours else f"{minutes} min"
    return f"{value_s / 3600:.0f} h"
