"""Uploads by the id that the client gave them: one that was cut goes on where it was, or is removed after a while."""

import asyncio
import contextlib
import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

_KEEP_S = 120.0


class New(Protocol):
    """Something that grows beside its destination: `NewFile` or `NewTree`."""

    @property
    def received(self) -> int: ...

    size: int

    def write(self, data: bytes, /) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


class SupersededError(Exception):
    """Another request goes on with this upload."""


@dataclass(frozen=True)
class Verdict:
    """How an upload ended: an HTTP status, and what was said of it, or the size in bytes of what is there now."""

    status: int
    detail: str = ""
    size: int = 0


class Upload:
    """One upload, fed by one request after another. Methods but `take_over` block, and are for worker threads."""

    def __init__(self, new: New, linger_s: float) -> None:
        self.new = new
        self.linger_s = linger_s
        self._turn = 0
        self._lock = threading.Lock()

    def take_over(self) -> int:
        """From now on only who shows this number may write."""
        with self._lock:
            self._turn += 1
            return self._turn

    def write(self, turn: int, data: bytes) -> None:
        """Raises: SupersededError; what `New.write` raises."""
        with self._lock:
            if turn != self._turn:
                raise SupersededError
            self.new.write(data)

    def publish(self, turn: int) -> None:
        """Raises: SupersededError; what `New.publish` raises."""
        with self._lock:
            if turn != self._turn:
                raise SupersededError
            self.new.publish()

    def discard(self) -> None:
        """Let go of it, whoever writes to it."""
        with self._lock:
            self._turn += 1
            self.new.discard()


class Uploads:
    """Those that run or may go on, and for two minutes how the others ended: an answer may have been lost."""

    def __init__(self) -> None:
        self._open: dict[str, Upload] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ended: dict[str, Verdict] = {}
        _tables.add(self)

    def find(self, upload_id: str) -> Upload | None:
        """The upload with this id, if it may go on; its time to be removed is put off."""
        self._stop_timer(upload_id)
        return self._open.get(upload_id)

    def verdict(self, upload_id: str) -> Verdict | None:
        """How the upload ended; None: it has not, or nobody knows."""
        return self._ended.get(upload_id)

    def add(self, upload_id: str, upload: Upload) -> None:
        """From now on it may go on."""
        self._open[upload_id] = upload

    def rest(self, upload_id: str) -> None:
        """Nobody writes to it at present: remove it if nobody goes on in time."""
        upload = self._open.get(upload_id)
        if upload is None:
            return
        self._stop_timer(upload_id)
        loop = asyncio.get_running_loop()

        def remove() -> None:
            self._timers.pop(upload_id, None)
            self._open.pop(upload_id, None)
            loop.run_in_executor(None, upload.discard)

        self._timers[upload_id] = loop.call_later(upload.linger_s, remove)

    def end(self, upload_id: str, verdict: Verdict) -> None:
        """It is over; what it left aside is the caller's to discard."""
        self._stop_timer(upload_id)
        self._open.pop(upload_id, None)
        self._ended[upload_id] = verdict
        asyncio.get_running_loop().call_later(_KEEP_S, lambda: self._ended.pop(upload_id, None))

    def _stop_timer(self, upload_id: str) -> None:
        if (timer := self._timers.pop(upload_id, None)) is not None:
            timer.cancel()

    def discard_all(self) -> None:
        """The server ends."""
        for upload in self._open.values():
            with contextlib.suppress(OSError):
                upload.discard()


_tables: weakref.WeakSet[Uploads] = weakref.WeakSet()


def discard_all() -> None:
    """The server ends: what nobody can go on with any more is removed."""
    for table in list(_tables):
        table.discard_all()
