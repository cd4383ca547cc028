"""Taking connections for as long as a listener is open, whatever the machine is short of meanwhile."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable

from hpc_workspace import clock

log = logging.getLogger(__name__)

# Between two lives of a job each connection waits for the next one.
_SERVED_MAX = 512
_PAUSE_S = 0.05


def accept_each(listener: socket.socket, serve: Callable[[socket.socket, tuple[str, int]], None]) -> None:
    """Serve each connection in a thread of its own, until `listener` is closed."""
    slots = threading.BoundedSemaphore(_SERVED_MAX)

    def serve_one(connection: socket.socket, address: tuple[str, int]) -> None:
        try:
            serve(connection, address)
        finally:
            slots.release()

    while True:
        try:
            connection, address = listener.accept()
        except OSError as error:
            if listener.fileno() < 0 or error.errno == errno.EINVAL:
                return  # closed
            log.warning("can't accept a connection now: %s", error)  # out of descriptors, say
            clock.sleep(_PAUSE_S)
            continue
        if not slots.acquire(blocking=False):
            connection.close()
            continue
        try:
            threading.Thread(target=serve_one, args=(connection, address), daemon=True).start()
        except RuntimeError as error:
            log.warning("no thread for a connection: %s", error)
            slots.release()
            connection.close()
