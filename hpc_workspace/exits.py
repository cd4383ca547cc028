"""An orderly end for this process while it holds workspaces: what would kill it at once becomes an ordinary exit.

SIGTERM and SIGHUP end a Python program without its `with` blocks and exit handlers, and a job would go on until it is
idle for too long. While workspaces are open, and only where the program has no handler of its own, they raise
SystemExit in the main thread, as Ctrl-C raises KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def make_orderly() -> None:
    """Have SIGTERM and SIGHUP raise SystemExit, with the exit code that shells give a killed program.

    Handlers of the program's own stay. From another thread than the main one nothing happens: only that one may.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit)


def make_default_again() -> None:
    """Undo `make_orderly`, as far as nobody has changed the handlers since."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is _exit:
                signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
