"""Text from people: no control characters. The lowest of the values."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def no_control(value: str) -> str:
    """`value`, if it has no control character: a newline in a batch script is a new line of shell.

    Raises:
        ValueError: it has one, or can't be written to a file: bytes that are no UTF-8 can (PEP 383), half a character
            of UTF-16 can't.
    """
    if _CONTROL.search(value):
        raise ValueError("has a control character (a newline, say)")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("has half a character (a lone surrogate)") from None
    return value


Text = Annotated[str, AfterValidator(no_control)]


def format_bytes(count: float) -> str:
    """A size for people, in powers of 1000: `951 B`, `36.0 MB`, `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
