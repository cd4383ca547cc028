"""Progress: what a fetch says while it works, and how it becomes lines of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hpc_workspace import clock
from hpc_workspace.text import format_bytes

_LINE_EVERY_S = 15.0


@dataclass(frozen=True)
class Step:
    """Where a fetch is.

    Attributes:
        reference: of what image.
        text: what happens, in words, such as `downloading`.
        done_bytes, total_bytes: how far it is; None where that is not known.
    """

    reference: str
    text: str
    done_bytes: int | None = None
    total_bytes: int | None = None


Tell = Callable[[Step], None]


def as_lines(say: Callable[[str], None]) -> Tell:
    """Steps as lines: each new text, and how far it is every 15 s."""
    last: dict[str, tuple[str, float]] = {}

    def tell(step: Step) -> None:
        text, at_s = last.get(step.reference, ("", 0.0))
        if step.text == text and clock.now_s() - at_s < _LINE_EVERY_S:
            return
        last[step.reference] = (step.text, clock.now_s())
        say(f"{step.reference}: {step.text} {how_far(step)}".rstrip())

    return tell


def how_far(step: Step) -> str:
    """`37.9 MB`, `12.0 MB of 37.9 MB`; empty where it is not known."""
    if step.total_bytes is None or step.done_bytes is None:
        return ""
    if step.done_bytes == 0:
        return format_bytes(step.total_bytes)
    return f"{format_bytes(step.done_bytes)} of {format_bytes(step.total_bytes)}"
