"""The watch over jobs whose workspaces are open: one thread for all, which asks Slurm one question for all.

A node that dies says nothing: a connection to it just stays silent. The shared directory and Slurm know better. What
neither says for certain is not an end: a controller that does not answer says nothing about a job.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

# Slurm's administrators ask for few questions; a dead node is known to Slurm itself after SlurmdTimeout, often 300 s.
_AT_REST_S = 30.0


class Watched(Protocol):
    """What is watched. `find_news` gives what is to be done about something that happened, and None if nothing did;
    it is quick, and what it goes by is never older than 30 s."""

    def find_news(self) -> Callable[[], None] | None: ...


class Watch:
    """Watches over any number of workspaces' jobs, with one thread that lives while there are any.

    It keeps none of them alive: one that nobody holds any more is not watched any more.

    Args:
        at_rest_s: between two looks.
    """

    def __init__(self, at_rest_s: float = _AT_REST_S) -> None:
        self._at_rest_s = at_rest_s
        self.forget()

    def forget(self) -> None:
        """Watch nothing any more. A child does so after a fork: it has no such thread, and its lock may be held."""
        self._lock = threading.Lock()
        self._watched: weakref.WeakSet[Watched] = weakref.WeakSet()
        self._busy: weakref.WeakSet[Watched] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._changed = threading.Event()

    def add(self, watched: Watched) -> None:
        """Look after it until it is removed, and do what its news ask for, in a thread of their own."""
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._changed.clear()
                self._thread = threading.Thread(target=self._run, name="job watch", daemon=True)
                self._thread.start()

    def remove(self, watched: Watched) -> None:
        """Stop watching it; nothing happens if it is not watched."""
        with self._lock:
            self._watched.discard(watched)
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
            self._look()

    def _look(self) -> None:
        with self._lock:
            all_watched = list(self._watched)
        for watched in all_watched:
            if watched in self._busy:
                continue
            try:
                act = watched.find_news()
            except Exception:
                log.debug("the watch learned nothing", exc_info=True)
                continue
            if act is not None:
                # On its own: closing a connection to a node that is gone may take long, and the others are waiting.
                self._busy.add(watched)
                threading.Thread(target=self._act, args=(watched, act), name="job news", daemon=True).start()

    def _act(self, watched: Watched, act: Callable[[], None]) -> None:
        try:
            act()
        finally:
            self._busy.discard(watched)


watch = Watch()
os.register_at_fork(after_in_child=watch.forget)
