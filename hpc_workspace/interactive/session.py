"""This end of an interactive session: what a program prints and what it is told, for any threads of the caller's."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from hpc_workspace import clock
from hpc_workspace.connect.streams import Stream
from hpc_workspace.errors import TunnelLostError, WorkspaceError
from hpc_workspace.interactive import frames
from hpc_workspace.link import close_quietly
from hpc_workspace.results import OutputChunk

# Gives an error, and since when it may have been broken (`clock.now_s`), as one that says what broke it.
Explain = Callable[[WorkspaceError, float], WorkspaceError]

_READ_BYTES = 256 * 1024
_PING_S = 15.0
_LOOK_S = 5.0
# A connection that hangs may hang while it is closed, too.
_HANG_UP_S = 2.0
# Longer than a link that is down for a while.
_ANSWER_WITHIN_S = 45.0
_SIGNALS_MAX = 64
_STREAMS = {frames.STDOUT: "stdout", frames.STDERR: "stderr"}


class Session:
    """A program that runs inside the workspace, on a terminal of its own or on pipes. Get one from `open_session`.

    Iterate over it for the output as it comes; afterwards `exit_code` is set. The program ends, with all that it
    started, when the session is closed, or when the connection to it is lost: nothing of it goes on. Leaving a `with`
    block closes it.

    At most 1 MiB of output is held here; a reader that is slower than that slows the program.

    Attributes:
        exit_code: the program's; -N when signal N ended it; None while it runs.
    """

    def __init__(
        self, stream: Stream, received: bytes = b"", *, node: str = "", explain: Explain = lambda error, since_s: error
    ) -> None:
        self.exit_code: int | None = None
        self._stream = stream
        self._node = node
        self._explain = explain
        self._decoder = frames.Decoder()
        self._changed = threading.Condition()
        self._chunks: collections.deque[OutputChunk] = collections.deque()
        self._lost: WorkspaceError | None = None
        self._is_closed = False
        # What is to be sent: input in pieces, and of the rest only the latest, so that nothing piles up.
        self._input: collections.deque[bytes] = collections.deque()
        self._credit = frames.WINDOW_BYTES
        self._input_ended = False
        self._end_is_due = False
        self._reads_no_more = False
        self._size: tuple[int, int] | None = None
        self._signals: collections.deque[int] = collections.deque(maxlen=_SIGNALS_MAX)
        self._taken = 0
        self._heard_s = clock.now_s()
        # When the other side was asked for a sign of life that has not come yet.
        self._asked_s: float | None = None
        self._question_is_due = False
        self._take(received)
        for work in (self._read, self._write):
            threading.Thread(target=work, name=f"hpc-workspace-session-{work.__name__}", daemon=True).start()

    def __repr__(self) -> str:
        if self.exit_code is not None:
            state = f"ended with {self.exit_code}"
        else:
            state = "lost" if self._lost else "closed" if self._is_closed else "open"
        return f"<Session on {self._node} [{state}]>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[OutputChunk]:
        while (chunk := self.receive()) is not None:
            yield chunk

    def receive(self, timeout_s: float | None = None) -> OutputChunk | None:
        """The next piece of output; None once there is no more, and `exit_code` is set. A terminal has stdout alone.

        Args:
            timeout_s: how long to wait for it; None: for ever.

        Raises:
            TimeoutError: nothing came in that time; the session goes on.
            TunnelError, ContainerError, JobError: the connection was lost, and with it the program.
        """
        with self._changed:
            if not self._wait(lambda: self._chunks or self.exit_code is not None, timeout_s):
                raise TimeoutError(f"no output within {timeout_s:g} s")
            if not self._chunks:
                return None
            chunk = self._chunks.popleft()
            self._taken += len(chunk.data)
            self._changed.notify_all()
            return chunk

    def send(self, data: bytes) -> None:
        """Give the program input; waits while it is a MiB behind.

        Raises:
            BrokenPipeError: it reads no more, or has ended.
            TunnelError, ContainerError, JobError: as `receive`.
        """
        rest = memoryview(data)
        while rest:
            with self._changed:
                self._wait(lambda: self._credit > 0 or self._takes_no_input, None)
                if self._takes_no_input:
                    raise BrokenPipeError("the program reads no more")
                piece = bytes(rest[: min(self._credit, frames.DATA_MAX_BYTES)])
                self._credit -= len(piece)
                self._input.append(piece)
                self._changed.notify_all()
            rest = rest[len(piece) :]

    @property
    def _takes_no_input(self) -> bool:
        return self._reads_no_more or self._input_ended or self.exit_code is not None

    def end_input(self) -> None:
        """No more input: the program reads the end of its stdin. On a terminal, its end-of-file key (^D) is typed."""
        with self._changed:
            self._input_ended = self._end_is_due = True
            self._changed.notify_all()

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has another size now; without a terminal, nothing happens."""
        with self._changed:
            self._size = rows, columns
            self._changed.notify_all()

    def send_signal(self, number: int) -> None:
        """Signal what is in the terminal's foreground; without a terminal, the program and what is in its group."""
        with self._changed:
            self._signals.append(number)
            self._changed.notify_all()

    def close(self) -> None:
        """End the session; what still runs in it gets HUP and TERM, and a second later KILL. Can be called again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._hang_up()

    def _hang_up(self) -> None:
        closing = threading.Thread(target=close_quietly, args=(self._stream,), daemon=True)
        closing.start()
        closing.join(_HANG_UP_S)

    def _wait(self, is_so: Callable[[], object], timeout_s: float | None) -> bool:
        """Wait until it is so, with the lock held; False where it is not in time.

        Raises:
            WorkspaceError: the connection is lost. What had arrived before is still given out.
        """
        deadline = clock.Deadline(timeout_s)
        while not is_so():
            if self._lost is not None:
                raise self._explained()
            if self._is_closed:
                raise TunnelLostError("The session is closed.", node=self._node)
            if deadline.is_over:
                return False
            self._changed.wait(min(deadline.left_s, _LOOK_S))
            self._look_for_silence()
        return True

    def _look_for_silence(self) -> None:
        now_s = clock.now_s()
        if self._asked_s is None:
            if now_s - self._heard_s >= _PING_S:
                self._asked_s = now_s
                self._question_is_due = True
                self._changed.notify_all()
        # After a pause of this whole process, the answer may be there already.
        elif now_s - self._asked_s > _ANSWER_WITHIN_S and not self._stream.is_readable():
            self._lose(f"no answer for {now_s - self._asked_s:.0f} s")

    def _explained(self) -> WorkspaceError:
        """Why the connection was lost; what broke it is asked once."""
        assert self._lost is not None
        explain, self._explain = self._explain, lambda error, since_s: error
        self._lost = explain(self._lost, clock.now_s())
        return self._lost

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self.exit_code is None and not self._is_closed and self._lost is None:
                self._lost = TunnelLostError(
                    f"The connection to a session on {self._node} was lost.",
                    node=self._node,
                    evidence=reason,
                    remedy="What ran in it has ended; open another.",
                )
            self._changed.notify_all()
        self._hang_up()

    def _read(self) -> None:
        try:
            while data := self._stream.recv(_READ_BYTES):
                self._take(data)
        except (OSError, WorkspaceError, frames.FrameError) as error:
            self._lose(str(error) or type(error).__name__)
        else:
            self._lose("the other side ended it")

    def _take(self, data: bytes) -> None:
        with self._changed:
            self._heard_s, self._asked_s = clock.now_s(), None
            for kind, payload in self._decoder.feed(data):
                if kind in _STREAMS:
                    self._chunks.append(OutputChunk(stream=_STREAMS[kind], data=payload))
                elif kind == frames.CREDIT:
                    self._credit += frames.parse_count(payload)
                elif kind == frames.INPUT_END:
                    self._reads_no_more = True
                elif kind == frames.EXIT:
                    self.exit_code = frames.parse_code(payload)
            self._changed.notify_all()

    def _write(self) -> None:
        try:
            while (said := self._next_words()) is not None:
                self._stream.sendall(said)
        except (OSError, WorkspaceError) as error:
            self._lose(str(error) or type(error).__name__)

    def _next_words(self) -> bytes | None:
        """What is to be sent next, waited for; None: nothing any more. A sign of life, where nothing was for long."""
        with self._changed:
            is_due = self._changed.wait_for(self._has_words, _PING_S)
            if self._is_over:
                return None
            said = [frames.build_frame(frames.PING)] if self._question_is_due or not is_due else []
            self._question_is_due = False
            said += [frames.build_frame(frames.SIGNAL, bytes([number])) for number in self._signals]
            self._signals.clear()
            if self._size is not None:
                said.append(frames.build_frame(frames.RESIZE, frames.build_size(*self._size)))
                self._size = None
            if self._taken >= frames.WINDOW_BYTES // 4:
                said.append(frames.build_frame(frames.CREDIT, frames.build_count(self._taken)))
                self._taken = 0
            said += [frames.build_frame(frames.INPUT, piece) for piece in self._input]
            self._input.clear()
            if self._end_is_due:
                said.append(frames.build_frame(frames.INPUT_END))
                self._end_is_due = False
            return b"".join(said)

    def _has_words(self) -> bool:
        is_credit_due = self._taken >= frames.WINDOW_BYTES // 4
        is_due = self._question_is_due or self._end_is_due or is_credit_due
        return bool(self._is_over or is_due or self._input or self._signals or self._size)

    @property
    def _is_over(self) -> bool:
        return self.exit_code is not None or self._is_closed or self._lost is not None
