"""The watch over jobs whose workspaces are open: one thread for all, which asks Slurm one question for all.

A node that dies says nothing: a connection to it just stays silent. The shared directory and Slurm know better. What
neither says for certain is not an end: a controller that does not answer says nothing about a job.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

from hpc_workspace.errors import WorkspaceError

log = logging.getLogger(__name__)

# Slurm's administrators ask for few questions; a dead node is known to Slurm itself after SlurmdTimeout, often 300 s.
_AT_REST_S = 30.0


class Watched(Protocol):
    """What is watched: `find_end` is as in `Launched`, and never older than 30 s."""

    def find_end(self) -> WorkspaceError | None: ...


class Watch:
    """Watches over any number of launched node programs, with one thread that lives while there are any.

    Args:
        at_rest_s: between two looks.
    """

    def __init__(self, at_rest_s: float = _AT_REST_S) -> None:
        self._at_rest_s = at_rest_s
        self.forget()

    def forget(self) -> None:
        """Watch nothing any more. A child does so after a fork: it has no such thread, and its lock may be held."""
        # Reentrant: a workspace that is collected removes itself, in whatever thread the collector runs, this one too.
        self._lock = threading.RLock()
        self._watched: dict[Watched, Callable[[WorkspaceError], None]] = {}
        self._thread: threading.Thread | None = None
        self._changed = threading.Event()

    def add(self, launched: Watched, on_end: Callable[[WorkspaceError], None]) -> None:
        """Call `on_end` once, from a thread of its own, when `launched` has ended; unless it is removed before."""
        with self._lock:
            self._watched[launched] = on_end
            if self._thread is None:
                self._changed.clear()
                self._thread = threading.Thread(target=self._run, name="job watch", daemon=True)
                self._thread.start()

    def remove(self, launched: Watched) -> None:
        """Stop watching it; nothing happens if it is not watched."""
        with self._lock:
            self._watched.pop(launched, None)
            if not self._watched:
                self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.wait(self._at_rest_s)
            with self._lock:
                if not self._watched:
                    self._thread = None
                    return
                self._changed.clear()  # the last one went, and another came before we woke
                watched = list(self._watched.items())
            for launched, on_end in watched:
                self._look(launched, on_end)

    def _look(self, launched: Watched, on_end: Callable[[WorkspaceError], None]) -> None:
        try:
            error = launched.find_end()
        except Exception:
            log.debug("the watch learned nothing", exc_info=True)
            return
        if error is None:
            return
        with self._lock:
            was_watched = self._watched.pop(launched, None) is not None
        if was_watched:
            # On its own: closing a connection to a node that is gone may take long, and the others are waiting.
            threading.Thread(target=on_end, args=(error,), name="job ended", daemon=True).start()


watch = Watch()
os.register_at_fork(after_in_child=watch.forget)
