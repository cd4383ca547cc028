"""The terminal that a person sits at: its size, raw mode, and the keys that get away from a session that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from collections.abc import Callable, Iterator
from types import FrameType

DEFAULT_SIZE = 24, 80
_NEWLINES = b"\r\n"


def find_size(*descriptors: int) -> tuple[int, int]:
    """Rows and columns of the first of these that is a terminal and knows them; else 24 and 80."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(descriptor)
            if rows and columns:
                return rows, columns
    return DEFAULT_SIZE


@contextlib.contextmanager
def raw_mode(descriptor: int) -> Iterator[None]:
    """Every key goes to the program, none to the terminal's own editing or signals. Undone however the block ends."""
    before = termios.tcgetattr(descriptor)

    def set_raw(*_: object) -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            tty.setraw(descriptor, termios.TCSANOW)

    set_raw()
    try:
        # After a stop, the shell has put the terminal to its own use.
        with handling(signal.SIGCONT, set_raw):
            yield
    finally:
        # Not TCSADRAIN: a terminal that takes no output any more would keep us here.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextlib.contextmanager
def handling(number: signal.Signals, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have a signal handled by `handle` within the block. One that is ignored, as under nohup(1), stays so."""
    before = signal.getsignal(number)
    if before is not signal.SIG_IGN:
        signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


class EscapeKeys:
    """Finds `~.` at the beginning of a line in what is typed, as ssh(1) does. `~~` there is one `~`."""

    def __init__(self) -> None:
        self._is_at_start = True
        self._has_tilde = False

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """What is for the program, and whether the person wants to leave; then the rest of `typed` is left out."""
        passed = bytearray()
        for key in typed:
            if self._has_tilde:
                self._has_tilde = False
                if key == ord("."):
                    return bytes(passed), True
                passed += b"~" if key == ord("~") else bytes([ord("~"), key])
            elif self._is_at_start and key == ord("~"):
                self._has_tilde = True
                continue
            else:
                passed.append(key)
            self._is_at_start = key in _NEWLINES
        return bytes(passed), False
