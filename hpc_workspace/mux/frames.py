"""The multiplexer's frames, as functions over bytes: no socket, no clock.

Each side first sends GREETING, then frames: one byte of kind, four of stream number, two of length, the payload. What
comes before the other side's greeting (a login banner, the `echo` of a `.bashrc`, a word of srun's) is passed over, up
to a bound. As in PNG's signature, the newline in the greeting shows up a terminal that changes newlines on the way.
"""

from __future__ import annotations

import struct

_SIGNATURE = b"\0\xffHWMUX\n"
VERSION = 1
GREETING = _SIGNATURE + bytes([VERSION])
NOISE_MAX_BYTES = 64 * 1024

_HEAD = struct.Struct(">BIH")
FRAME_MAX_BYTES = 64 * 1024
PAYLOAD_MAX_BYTES = FRAME_MAX_BYTES - _HEAD.size
TEXT_MAX_BYTES = 4096
_COUNT = struct.Struct(">I")
STREAM_MAX = 2**32 - 1

# client -> bridge: connect this stream to the payload's target
OPEN = 1
# bridge -> client: it is connected; or it is not, for the payload's reason, and the stream is over
OPENED, REFUSED = 2, 3
# both ways: bytes; no more bytes from here; it is over both ways, and the payload says why
DATA, EOF, RESET = 4, 5, 6
# both ways: so many bytes were taken, as many more may be sent
WINDOW = 7
# both ways, of no stream
PING, PONG = 8, 9

# The fewest and the most bytes of payload.
_LENGTHS = {
    OPEN: (1, TEXT_MAX_BYTES),
    OPENED: (0, 0),
    REFUSED: (0, TEXT_MAX_BYTES),
    DATA: (1, PAYLOAD_MAX_BYTES),
    EOF: (0, 0),
    RESET: (0, TEXT_MAX_BYTES),
    WINDOW: (_COUNT.size, _COUNT.size),
    PING: (0, 0),
    PONG: (0, 0),
}
_OF_NO_STREAM = frozenset((PING, PONG))


class MuxError(ConnectionError):
    """The pipe, and every stream on it, is at its end; the text says why, with what the other side said."""


class MuxGreetingError(MuxError):
    """Whatever is at the other end does not greet: `said` is what came instead, readable."""

    def __init__(self, what: str, said: bytes) -> None:
        self.said = printable(said)
        super().__init__(f"{what}; it said: {self.said}" if self.said else what)


class MuxProtocolError(MuxError):
    """A frame that can't be: noise in the middle, or a fault of the other side's."""


class MuxSilenceError(MuxError, TimeoutError):
    """The other side answers no more."""


def printable(data: bytes) -> str:
    """The last of `data` on one line, without control characters: it may be meant for a terminal, and not kindly."""
    text = data[-2000:].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else " " for character in text).strip()


# Kind, stream number (0: none) and payload.
Frame = tuple[int, int, bytes]


def build_frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    return build_head(kind, stream, len(payload)) + payload


def build_head(kind: int, stream: int, length: int) -> bytes:
    """What goes before a payload of `length` bytes."""
    return _HEAD.pack(kind, stream, length)


def build_count(count: int) -> bytes:
    return _COUNT.pack(count)


def parse_count(payload: bytes) -> int:
    return int(_COUNT.unpack(payload)[0])


def build_text(text: str) -> bytes:
    """`text` as a payload, cut where it is too long."""
    return text.encode("utf-8", "replace")[:TEXT_MAX_BYTES]


class Decoder:
    """Turns a byte stream, in whatever pieces it comes, into frames.

    Args:
        noise_max_bytes: how much may come before the greeting.
    """

    def __init__(self, noise_max_bytes: int = NOISE_MAX_BYTES) -> None:
        self._noise_max_bytes = noise_max_bytes
        self._buffer = bytearray()
        self.greeted = False

    @property
    def noise(self) -> bytes:
        """What came instead of a greeting so far."""
        return b"" if self.greeted else bytes(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes.

        Raises:
            MuxGreetingError: there was more noise than may be, or the greeting is of another version, or was changed.
            MuxProtocolError: this is no frame.
        """
        self._buffer += data
        if not self.greeted and not self._find_greeting():
            return []
        return self._parse()

    def _find_greeting(self) -> bool:
        at = self._buffer.find(_SIGNATURE)
        if at < 0:
            if _SIGNATURE.replace(b"\n", b"\r\n") in self._buffer:
                raise MuxGreetingError("the way to it changes newlines, as a terminal does", b"")
            if len(self._buffer) > self._noise_max_bytes + len(_SIGNATURE):
                raise MuxGreetingError("it is not the bridge that answers", bytes(self._buffer))
            return False
        if at > self._noise_max_bytes:
            raise MuxGreetingError("it said too much before the bridge answered", bytes(self._buffer[:at]))
        end = at + len(GREETING)
        if len(self._buffer) < end:
            return False
        if (version := self._buffer[end - 1]) != VERSION:
            raise MuxGreetingError(f"the other side speaks version {version}, this one {VERSION}", b"")
        del self._buffer[:end]
        self.greeted = True
        return True

    def _parse(self) -> list[Frame]:
        found: list[Frame] = []
        buffer, at, held = self._buffer, 0, len(self._buffer)
        while held - at >= _HEAD.size:
            kind, stream, length = _HEAD.unpack_from(buffer, at)
            fewest, most = _LENGTHS.get(kind, (1, 0))
            if not fewest <= length <= most or (stream == 0) != (kind in _OF_NO_STREAM):
                raise MuxProtocolError(f"this is no frame: {printable(bytes(buffer[at : at + 200]))!r}")
            end = at + _HEAD.size + length
            if end > held:
                break
            found.append((kind, stream, bytes(memoryview(buffer)[at + _HEAD.size : end])))
            at = end
        del buffer[:at]
        return found
