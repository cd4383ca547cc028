"""Markup that is safe by default: text is escaped unless it was made here. What is made is well-formed XML."""

from __future__ import annotations

import html
from collections.abc import Iterable

Value = str | float | int | None


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def visible(text: str) -> str:
    """`text` with nothing in it that does not show: controls, marks that turn the writing around, half characters.

    Control characters become their pictures (U+2400 …), others their number as `\\u202e`; so a line stays a line.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _shown(char) for char in text)


def _shown(char: str) -> str:
    number = ord(char)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    return f"\\u{number:04x}"


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters, its middle left out: ids differ at their ends."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def escape(text: str) -> Markup:
    """`text` as markup; what is markup already stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(text)))


def tag(name: str, /, *children: str, **attributes: Value) -> Markup:
    """An element.

    Args:
        attributes: `class_` is `class`, `stroke_width` is `stroke-width`; None leaves it out; numbers are rounded to
            a tenth, which is a tenth of a pixel in a drawing.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_written(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = join(children)
    return Markup(f"<{name}{said}>{inner}</{name}>" if inner or name not in _VOID else f"<{name}{said}/>")


_VOID = frozenset(("meta", "br", "rect", "line", "path", "circle", "polyline", "use"))


def join(parts: Iterable[str]) -> Markup:
    """The parts, one behind the other, each escaped unless it is markup."""
    return Markup("".join(map(escape, parts)))


def _written(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
