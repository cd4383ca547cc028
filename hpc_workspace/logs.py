"""Reading log files that still grow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc_workspace import clock

_LOOK_S = 0.5
_MAX_LINE = 4000


class LogFollower:
    """Passes each line of a file on to a logger until `close`. The file is complete either way.

    Lines lose their control characters: what a container prints must not steer the terminal that shows it.
    """

    def __init__(self, path: Path, logger: logging.Logger, prefix: str) -> None:
        self._path = path
        self._logger = logger
        self._prefix = prefix
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"hpc-workspace-log-{prefix}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what is there now, and stop."""
        self._closing.set()
        self._thread.join()

    def _follow(self) -> None:
        for line in read_lines(self._path, until=self._closing.is_set, pause=self._closing.wait):
            self._logger.info("%s: %s", self._prefix, line)


def read_lines(
    path: Path, *, until: Callable[[], bool], pause: Callable[[float], object] = clock.sleep
) -> Iterator[str]:
    """The lines of a file that grows, without control characters, as they come; what is there is always read.

    Args:
        until: whether no more will come. The file is read once more after it said so, and that is the end; as is the
            file's own.
        pause: waits so many seconds between two looks.
    """
    offset, rest = 0, b""
    while True:
        is_last = until()
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except OSError:
            return  # removed with its workspace
        offset += len(data)
        *lines, rest = (rest + data).split(b"\n")
        yield from map(_printable, lines)
        if is_last:
            if rest:
                yield _printable(rest)
            return
        pause(_LOOK_S)


def _printable(line: bytes) -> str:
    return "".join(c for c in line[:_MAX_LINE].decode("utf-8", "replace") if c.isprintable() or c == "\t")
