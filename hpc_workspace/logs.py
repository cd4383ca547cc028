"""Following a log file to a logger, in the background."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

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
        offset, rest = 0, b""
        while True:
            is_last = self._closing.wait(_LOOK_S)
            try:
                with self._path.open("rb") as file:
                    file.seek(offset)
                    data = file.read()
            except OSError:
                return  # removed with its workspace
            offset += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._logger.info("%s: %s", self._prefix, _printable(line))
            if is_last:
                return


def _printable(line: bytes) -> str:
    return "".join(c for c in line[:_MAX_LINE].decode("utf-8", "replace") if c.isprintable() or c == "\t")
