"""The client's side of the multiplexer, for many threads: one thread of its own watches the pipe.

Whoever sends writes to the pipe himself, as far as it takes bytes at once, so that a small request waits for no other
thread; what is left over is the watching thread's. That one alone reads, and never waits for anybody but the pipe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections.abc import Callable

from hpc_workspace import clock
from hpc_workspace.mux.frames import MuxError, MuxGreetingError, MuxSilenceError
from hpc_workspace.mux.session import Channel, Session

PING_AFTER_S = 15.0
DEAD_AFTER_S = 45.0
_IDLE_S = 3600.0
_READ_BYTES = 256 * 1024
# How long what was sent may take to reach a pipe that is being closed.
_LINGER_S = 1.0


class StreamRefusedError(ConnectionRefusedError):
    """The bridge is there and does not connect this target; the text is its reason."""


class MuxStream:
    """One stream, as `connect.streams.Stream` has it, and with half closes. Safe to use from several threads.

    All but `close` raise OSError once the pipe or the far end is broken: TimeoutError after `settimeout`'s time,
    ConnectionResetError with the reason otherwise. What came before that can still be received.
    """

    def __init__(self, mux: Mux, channel: Channel) -> None:
        self._mux = mux
        self._channel = channel
        self._timeout_s: float | None = None
        self._is_closed = False
        self.changed = threading.Condition(mux.lock)

    def __repr__(self) -> str:
        return f"<MuxStream {self._channel!r}>"

    def settimeout(self, timeout_s: float | None) -> None:
        """Seconds that one `recv` or `sendall` may take; None: for ever."""
        self._timeout_s = timeout_s

    def wait_open(self, timeout_s: float) -> None:
        """Wait until the target is connected.

        Raises:
            StreamRefusedError: it can't be.
            OSError: the pipe broke (MuxError), or there was no answer in time (TimeoutError).
        """
        channel = self._channel
        with self.changed:
            self._wait(lambda: channel.opened or channel.refusal is not None, timeout_s)
            if channel.refusal is not None:
                raise StreamRefusedError(channel.refusal)
            if not channel.opened and self._mux.error is not None:
                raise self._mux.error

    def recv(self, size: int) -> bytes:
        """At least one byte, or none if the other side has ended the stream or this side has closed it."""
        channel = self._channel
        with self.changed:
            self._wait(lambda: channel.has_bytes or channel.ended or self._is_closed, self._timeout_s)
            if data := self._mux.session.take(channel, size):
                self._mux.flush()
                return data
            if not self._is_closed:
                self._require_whole()
            return b""

    def sendall(self, data: bytes) -> None:
        """Send all of `data`; returns when it is under way."""
        channel = self._channel
        deadline = clock.Deadline(self._timeout_s)
        rest = memoryview(bytes(data))
        with self.changed:
            while rest:
                left_s = None if deadline.timeout_s is None else deadline.left_s
                self._wait(lambda: channel.room_bytes > 0 or not channel.sends, left_s)
                self._require_whole()
                if not channel.sends or self._mux.error is not None:
                    raise BrokenPipeError(errno.EPIPE, "the stream was ended")
                rest = rest[self._mux.session.send(channel, rest) :]
                self._mux.flush()

    def end(self) -> None:
        """Send no more; more may still come."""
        with self.changed:
            self._mux.session.end(self._channel)
            self._mux.flush()

    def is_readable(self) -> bool:
        """Whether `recv` would return, or raise, at once."""
        channel = self._channel
        return channel.has_bytes or channel.ended or self._is_closed or self._mux.error is not None

    def abandon(self) -> None:
        """Nothing: a forked child has let go of the whole pipe."""

    def close(self) -> None:
        """End both ways; what was sent still arrives. Who waits on the stream is woken."""
        with self.changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._mux.drop(self._channel)
            self.changed.notify_all()

    def _wait(self, is_done: Callable[[], bool], timeout_s: float | None) -> None:
        if not self.changed.wait_for(lambda: is_done() or self._mux.error is not None, timeout_s):
            raise TimeoutError(errno.ETIMEDOUT, f"nothing happened within {timeout_s:.3g} s")

    def _require_whole(self) -> None:
        reason = self._channel.broken
        if reason is None and self._mux.error is not None and not self._channel.ended:
            reason = str(self._mux.error)
        if reason is not None:
            raise ConnectionResetError(errno.ECONNRESET, reason or "the far end broke it")


class Pulse:
    """When to ask for a sign of life, and when to give up. Times are the caller's, of one clock."""

    def __init__(self, ping_after_s: float, dead_after_s: float, now_s: float) -> None:
        self._ping_after_s = ping_after_s
        self._answer_within_s = dead_after_s - ping_after_s
        self._heard_s = self._sent_s = now_s
        self._asked_s: float | None = None

    def heard(self, now_s: float) -> None:
        self._heard_s = now_s
        self._asked_s = None

    def sent(self, now_s: float) -> None:
        self._sent_s = now_s

    @property
    def _due_s(self) -> float:
        if self._asked_s is not None:
            return self._asked_s + self._answer_within_s
        # The other side, too, wants to hear from us.
        return min(self._heard_s, self._sent_s) + self._ping_after_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until `is_due` has something to say."""
        return max(0.0, self._due_s - now_s)

    def is_due(self, now_s: float) -> bool:
        """Whether to ask now; then that has been done. Call it only when there is nothing to be heard.

        Raises:
            MuxSilenceError: it was asked, and did not answer in time.
        """
        if now_s < self._due_s:
            return False
        if self._asked_s is not None:
            raise MuxSilenceError(f"the bridge has been silent for {now_s - self._heard_s:.0f} s")
        self._asked_s = now_s
        return True


class Mux:
    """Opens streams over a pair of pipes whose other end is a bridge.

    Args:
        read_fd, write_fd: descriptors of pipes, sockets or terminals, or twice the same; they are this object's now,
            which makes them non-blocking and closes them at its end.
        on_end: called in the watching thread when the descriptors are closed, once.
        ping_after_s: how long the pipe may be silent, either way, until the other side is asked for a sign of life.
        dead_after_s: how long it may be silent until it is taken for dead.

    Attributes:
        error: why there is no pipe any more; None while there is one.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        on_end: Callable[[], None] | None = None,
        ping_after_s: float = PING_AFTER_S,
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        self.lock = threading.Lock()
        self.session = Session(is_opener=True, on_change=self._on_change)
        self.error: MuxError | None = None
        self._read_fd, self._write_fd = read_fd, write_fd
        self._on_end = on_end
        self._pulse = Pulse(ping_after_s, dead_after_s, clock.now_s())
        self._greeted = threading.Condition(self.lock)
        self._streams: dict[int, MuxStream] = {}
        self._unwritten = memoryview(b"")
        self._closing: clock.Deadline | None = None
        for fd in {read_fd, write_fd}:
            os.set_blocking(fd, False)
        self._wake_read_fd, self._wake_write_fd = os.pipe()
        for fd in (self._wake_read_fd, self._wake_write_fd):
            os.set_blocking(fd, False)
        self._is_watched = True
        self._thread = threading.Thread(target=self._watch, name="hpc-workspace-mux", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Mux {self.session!r}{'' if self.error is None else f' ended: {self.error}'}>"

    def wait_greeted(self, timeout_s: float) -> None:
        """Wait until the bridge has shown that it is there.

        Raises:
            MuxError: it is not, or the pipe ended; MuxSilenceError after `timeout_s`, which ends the pipe.
        """
        with self._greeted:
            self._greeted.wait_for(lambda: self.session.is_greeted or self.error is not None, timeout_s)
            if not self.session.is_greeted and self.error is None:
                self._fail(MuxSilenceError(f"no bridge answered within {timeout_s:g} s"))
            if self.error is not None:
                raise self.error

    def open(self, target: str, timeout_s: float) -> MuxStream:
        """A new stream, connected with `target`.

        Raises:
            StreamRefusedError: the bridge can't or won't connect it.
            MuxError: the pipe is at its end.
            TimeoutError: no answer within `timeout_s`.
        """
        with self.lock:
            if self.error is not None:
                raise self.error
            channel = self.session.open(target)
            stream = self._streams[channel.number] = MuxStream(self, channel)
            self.flush()
        try:
            stream.wait_open(timeout_s)
        except BaseException:
            stream.close()
            raise
        return stream

    def close(self) -> None:
        """End the pipe and all of its streams; what was sent has a moment to get out. Does not wait for that."""
        with self.lock:
            if self._closing is None:
                self._closing = clock.Deadline(_LINGER_S)
                self._wake()

    def wait_closed(self, timeout_s: float) -> bool:
        """Whether the descriptors are closed, and `on_end` has returned, within `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def forget_after_fork(self) -> None:
        """In a forked child: let go of the descriptors, without a word to the other side, which is the parent's.

        The lock may be held for ever by a thread that is not there: the object can't be used any more.
        """
        if not self._is_watched:
            return
        self._is_watched = False
        self.error = MuxError("the pipe is that of the process this one was forked from")
        for fd in {self._read_fd, self._write_fd, self._wake_read_fd, self._wake_write_fd}:
            with contextlib.suppress(OSError):
                os.close(fd)

    def drop(self, channel: Channel) -> None:
        """Forget a stream that is closed. Call it with the lock."""
        self._streams.pop(channel.number, None)
        self.session.reset(channel)
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes at once, and leave the rest to the watching thread. Call it with the lock."""
        if self.error is not None:
            return
        try:
            while self._unwritten or self.session.has_output:
                if not self._unwritten:
                    self._unwritten = memoryview(self.session.output())
                count = os.write(self._write_fd, self._unwritten)
                self._unwritten = self._unwritten[count:]
                self._pulse.sent(clock.now_s())
        except BlockingIOError:
            if threading.current_thread() is not self._thread:
                self._wake()
        except OSError as error:
            self._fail(MuxError(f"the pipe broke: {error}"))

    def _wake(self) -> None:
        if self._is_watched:
            with contextlib.suppress(BlockingIOError):  # full: it will wake
                os.write(self._wake_write_fd, b"\0")

    def _on_change(self, channel: Channel) -> None:
        if (stream := self._streams.get(channel.number)) is not None:
            stream.changed.notify_all()

    def _fail(self, error: MuxError) -> None:
        """Everything is over, for this reason. Call it with the lock."""
        if self.error is None:
            self.error = error
            self._greeted.notify_all()
            for stream in self._streams.values():
                stream.changed.notify_all()
            self._streams.clear()
            self._wake()

    def _watch(self) -> None:
        try:
            while self.error is None:
                self._step()
        except MuxError as error:
            with self.lock:
                self._fail(error)
        finally:
            with self.lock:
                self._fail(MuxError("a fault of this side's"))  # unless there is a reason already
                self._is_watched = False
                for fd in {self._read_fd, self._write_fd, self._wake_read_fd, self._wake_write_fd}:
                    os.close(fd)
            if self._on_end is not None:
                self._on_end()

    def _step(self) -> None:
        """Wait for the pipe, or for a moment that was set, and do what is due.

        Raises:
            MuxError: that was the end.
        """
        poll = select.poll()
        with self.lock:
            wants_out = bool(self._unwritten)
            # Until it greets, who waits for that has a time-out of his own.
            wait_s = self._pulse.wait_s(clock.now_s()) if self.session.is_greeted else _IDLE_S
            if self._closing is not None:
                if self._closing.is_over or not (wants_out or self.session.has_output):
                    raise MuxError("this side has closed it")
                wait_s = min(wait_s, self._closing.left_s)
        poll.register(self._wake_read_fd, select.POLLIN)
        poll.register(self._read_fd, select.POLLIN)
        if wants_out:
            both = self._read_fd == self._write_fd
            poll.register(self._write_fd, select.POLLOUT | (select.POLLIN if both else 0))
        ready = dict(poll.poll(wait_s * 1000 + 1))
        if self._wake_read_fd in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read_fd, 4096)
        # A descriptor that is at its end tells of it when it is read.
        data = self._read() if ready.get(self._read_fd, 0) & ~select.POLLOUT else None
        with self.lock:
            if data is not None:
                self._pulse.heard(clock.now_s())
                was_greeted = self.session.is_greeted
                self.session.feed(data)
                if self.session.is_greeted and not was_greeted:
                    self._greeted.notify_all()
            elif self.session.is_greeted and not self._unwritten and self._pulse.is_due(clock.now_s()):
                self.session.ping()
            self.flush()

    def _read(self) -> bytes | None:
        """What came; None if that was a false alarm.

        Raises:
            MuxError: nothing will come any more.
        """
        try:
            data = os.read(self._read_fd, _READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:  # EIO: a terminal without another side
            raise MuxError(f"the pipe broke: {error}") from error
        if not data:
            if not self.session.is_greeted:
                raise MuxGreetingError("the bridge did not start", self.session.noise)
            raise MuxError("the bridge is gone")
        return data
