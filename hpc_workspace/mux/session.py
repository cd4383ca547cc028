"""What the frames mean: streams that open, carry bytes both ways under credit, and end. No socket, no thread, no clock.

Each direction of each stream has a window: so many bytes may be under way or lie at the other side untaken, and no
more. So a reader that is slow holds up its own stream only, and memory has a bound whatever the other side does.

One of these is used by one thread at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hpc_workspace.mux import frames
from hpc_workspace.mux.frames import MuxError, MuxProtocolError

WINDOW_BYTES = 1024 * 1024
# Credit is given back in pieces of this size: a frame of 11 bytes for each of 256 KiB.
_GIVE_BACK_BYTES = WINDOW_BYTES // 4
# How much of a stream may wait here for its turn: enough for two rounds of `output`.
OUTBOX_BYTES = 4 * frames.PAYLOAD_MAX_BYTES
OUTPUT_BYTES = 256 * 1024


class Channel:
    """One stream of a session.

    Attributes:
        target: what it is to be connected with, in the opener's words.
        opened: whether it is.
        refusal: why it is not and will not be; None: nobody has refused.
        ended: whether the other side will send no more bytes.
        broken: why it is over both ways before its time; None: it is not.
    """

    def __init__(self, number: int, target: str) -> None:
        self.number = number
        self.target = target
        self.opened = False
        self.refusal: str | None = None
        self.ended = False
        self.broken: str | None = None
        self._inbox: deque[memoryview] = deque()
        self._drops_input = False
        self._untaken_bytes = 0
        self._taken_bytes = 0
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0
        self._credit_bytes = WINDOW_BYTES
        self._finishes = False
        self._last_words: bytes | None = None  # a frame that goes out when the outbox is empty
        self._is_queued = False
        self._is_forgotten = False

    def __repr__(self) -> str:
        return f"<Channel {self.number} to {self.target} [{self._untaken_bytes} in, {self._outbox_bytes} out]>"

    @property
    def has_bytes(self) -> bool:
        return bool(self._inbox)

    @property
    def room_bytes(self) -> int:
        """How much `Session.send` takes now."""
        return max(0, OUTBOX_BYTES - self._outbox_bytes) if self.sends else 0

    @property
    def sends(self) -> bool:
        """Whether bytes can still be sent."""
        return not self._finishes and not self._is_forgotten

    @property
    def _has_output(self) -> bool:
        return bool(self._outbox and self._credit_bytes) or (self._last_words is not None and not self._outbox)


class Session:
    """One side of the pipe.

    Args:
        is_opener: whether this side opens streams; the other side accepts or refuses them.
        on_change: told of each channel of which something has changed: opened, refused, bytes came, room to send,
            ended, broken. A channel that is new to the accepting side is told of once more than that.
    """

    def __init__(self, *, is_opener: bool, on_change: Callable[[Channel], None]) -> None:
        self._is_opener = is_opener
        self._on_change = on_change
        self._decoder = frames.Decoder()
        self._channels: dict[int, Channel] = {}
        self._last_number = 0
        self._control: deque[bytes] = deque()
        if not is_opener:
            self._control.append(frames.GREETING)
        # Those with something to send, the next in turn first.
        self._turns: deque[Channel] = deque()

    def __repr__(self) -> str:
        return f"<Session [{len(self._channels)} channels{'' if self.is_greeted else ', not greeted'}]>"

    @property
    def is_greeted(self) -> bool:
        """Whether the other side has shown that it speaks this."""
        return self._decoder.greeted

    @property
    def noise(self) -> bytes:
        """What the other side said instead of greeting."""
        return self._decoder.noise

    @property
    def channels(self) -> list[Channel]:
        """Those that are not over."""
        return list(self._channels.values())

    def feed(self, data: bytes) -> None:
        """Take in what the other side sent.

        Raises:
            MuxError: it is no greeting, or no frame, or one that has no place here. The session is at its end.
        """
        was_greeted = self.is_greeted
        found = self._decoder.feed(data)
        if self._is_opener and self.is_greeted and not was_greeted:
            # Not before: until now, whatever is at the other end may have been a shell.
            self._control.appendleft(frames.GREETING)
        for frame in found:
            self._take_in(*frame)

    def _take_in(self, kind: int, number: int, payload: bytes) -> None:
        if kind == frames.PING:
            if (pong := frames.build_frame(frames.PONG)) not in self._control:
                self._control.append(pong)
            return
        if kind == frames.PONG:
            return
        if kind == frames.OPEN:
            if self._is_opener or number <= self._last_number:
                raise MuxProtocolError(f"stream {number} is opened out of turn")
            self._last_number = number
            channel = self._channels[number] = Channel(number, payload.decode("utf-8", "surrogateescape"))
            self._on_change(channel)
            return
        if number > self._last_number:
            raise MuxProtocolError(f"a frame of stream {number}, which was never opened")
        known = self._channels.get(number)
        if known is not None:  # else it is over on this side, and the other has not heard of that yet
            self._apply(known, kind, payload)
            self._on_change(known)

    def _apply(self, channel: Channel, kind: int, payload: bytes) -> None:
        if kind in (frames.OPENED, frames.REFUSED) and (not self._is_opener or channel.opened):
            raise MuxProtocolError(f"an answer for stream {channel.number}, of which nothing was asked")
        match kind:
            case frames.OPENED:
                channel.opened = True
            case frames.REFUSED:
                channel.refusal = payload.decode("utf-8", "replace")
                self._forget(channel)
            case frames.DATA if channel._drops_input:
                pass
            case frames.DATA:
                channel._untaken_bytes += len(payload)
                if channel.ended or channel._untaken_bytes > WINDOW_BYTES:
                    raise MuxProtocolError(f"more bytes for stream {channel.number} than may come")
                channel._inbox.append(memoryview(payload))
            case frames.EOF:
                channel.ended = True
                self._forget_if_over(channel)
            case frames.RESET:
                channel.broken = payload.decode("utf-8", "replace")
                channel.ended = True
                self._forget(channel)
            case frames.WINDOW:
                channel._credit_bytes += frames.parse_count(payload)
                if channel._credit_bytes > WINDOW_BYTES:
                    raise MuxProtocolError(f"more credit for stream {channel.number} than there is")
                self._queue(channel)

    def open(self, target: str) -> Channel:
        """A new channel; `opened` or `refusal` says what became of it.

        Raises:
            MuxError: every number was used once.
            ValueError: the target is too long to be told.
        """
        payload = target.encode("utf-8", "surrogateescape")
        if len(payload) > frames.TEXT_MAX_BYTES:
            raise ValueError(f"a target of {len(payload)} bytes")
        if self._last_number >= frames.STREAM_MAX:
            raise MuxError("this pipe has no stream number left")
        self._last_number += 1
        channel = self._channels[self._last_number] = Channel(self._last_number, target)
        self._control.append(frames.build_frame(frames.OPEN, channel.number, payload))
        return channel

    def accept(self, channel: Channel) -> None:
        """Say that `channel` is connected."""
        channel.opened = True
        self._control.append(frames.build_frame(frames.OPENED, channel.number))

    def refuse(self, channel: Channel, reason: str) -> None:
        """Say why `channel` can't be connected; it is over."""
        self._control.append(frames.build_frame(frames.REFUSED, channel.number, frames.build_text(reason)))
        channel.refusal = reason
        self._forget(channel)

    def send(self, channel: Channel, data: bytes | memoryview) -> int:
        """Take as much of `data`, which stays as it is, as there is room for. Returns how much that was."""
        piece = memoryview(data)[: channel.room_bytes]
        if piece:
            channel._outbox.append(piece)
            channel._outbox_bytes += len(piece)
            self._queue(channel)
        return len(piece)

    def take(self, channel: Channel, size: int) -> bytes:
        """At least one byte that came, and at most `size`; none if there are none."""
        if not channel._inbox or size <= 0:
            return b""
        piece = channel._inbox.popleft()
        if len(piece) > size:
            channel._inbox.appendleft(piece[size:])
            piece = piece[:size]
        data = bytes(piece)
        channel._untaken_bytes -= len(data)
        channel._taken_bytes += len(data)
        if channel._taken_bytes >= _GIVE_BACK_BYTES and not channel.ended and not channel._is_forgotten:
            count = frames.build_count(channel._taken_bytes)
            self._control.append(frames.build_frame(frames.WINDOW, channel.number, count))
            channel._taken_bytes = 0
        return data

    def end(self, channel: Channel) -> None:
        """Send no more bytes than were sent; more may come."""
        if channel.sends:
            channel._finishes = True
            channel._last_words = frames.build_frame(frames.EOF, channel.number)
            self._queue(channel)

    def reset(self, channel: Channel, reason: str = "") -> None:
        """End `channel` both ways; what was sent before still goes out, what comes is dropped."""
        channel._inbox.clear()
        if channel._is_forgotten:
            return
        channel._finishes = channel._drops_input = channel.ended = True
        channel._last_words = frames.build_frame(frames.RESET, channel.number, frames.build_text(reason))
        self._queue(channel)

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._control.append(frames.build_frame(frames.PING))

    @property
    def has_output(self) -> bool:
        return self._may_speak and bool(self._control or self._turns)

    @property
    def _may_speak(self) -> bool:
        return self.is_greeted or not self._is_opener

    def output(self) -> bytes:
        """What is to be sent now, as one piece: all control frames, then a frame of each channel in turn."""
        if not self._may_speak:
            return b""
        pieces: list[bytes | memoryview] = list(self._control)
        self._control.clear()
        size = 0
        while self._turns and size < OUTPUT_BYTES:
            channel = self._turns.popleft()
            channel._is_queued = False
            size += self._put_out(channel, pieces)
            self._queue(channel)
            self._on_change(channel)
        return b"".join(pieces)

    def _put_out(self, channel: Channel, pieces: list[bytes | memoryview]) -> int:
        """One DATA frame of `channel`, then its last words if it is empty. Returns the payload's size."""
        left = min(channel._credit_bytes, frames.PAYLOAD_MAX_BYTES)
        payload: list[memoryview] = []
        while channel._outbox and left:
            piece = channel._outbox.popleft()
            if len(piece) > left:
                channel._outbox.appendleft(piece[left:])
                piece = piece[:left]
            payload.append(piece)
            left -= len(piece)
        size = sum(map(len, payload))
        if size:
            channel._outbox_bytes -= size
            channel._credit_bytes -= size
            pieces += [frames.build_head(frames.DATA, channel.number, size), *payload]
        if not channel._outbox and channel._last_words is not None:
            pieces.append(channel._last_words)
            channel._last_words = None
            self._forget_if_over(channel)
        return size

    def _queue(self, channel: Channel) -> None:
        if not channel._is_queued and not channel._is_forgotten and channel._has_output:
            channel._is_queued = True
            self._turns.append(channel)

    def _forget_if_over(self, channel: Channel) -> None:
        if channel.ended and channel._finishes and channel._last_words is None:
            self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        channel._is_forgotten = True
        channel._outbox.clear()
        channel._outbox_bytes = 0
        self._channels.pop(channel.number, None)
        if channel._is_queued:
            channel._is_queued = False
            self._turns.remove(channel)
