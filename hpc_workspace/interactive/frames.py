"""What the two ends of an interactive session say to each other, as functions over bytes: no socket, no clock.

First the client says the token, TOKEN_BYTES of it, then both sides speak in frames: one byte of kind, four bytes of
length, the payload. Each side may be WINDOW_BYTES of data ahead of what the other has passed on (CREDIT gives some of
it back), and never stops to read: so a slow terminal slows the program, a program that does not read slows its writer,
neither grows anybody's memory, and a signal, or a question whether the other is still there, gets through all the same.

Runs in the workspace as well, so it is Python 3.8 and imports nothing of ours.
"""

from __future__ import annotations

import struct

TOKEN_BYTES = 64
WINDOW_BYTES = 1024 * 1024
DATA_MAX_BYTES = 64 * 1024
_FRAME_MAX_BYTES = 1024 * 1024

# To the host. START: JSON, what to run. INPUT: stdin. INPUT_END, to the host: no more of it; to the client: the program
# reads no more of it. RESIZE: rows and columns. SIGNAL: its number. PING: answered by PONG.
START, INPUT, INPUT_END, RESIZE, SIGNAL, PING = 1, 2, 3, 4, 5, 6
# Both ways: how many more bytes of data may come.
CREDIT = 7
# To the client. STARTED: it runs. FAILED: it could not be started, and why. EXIT: the last; N, or -N for signal N.
PONG, STARTED, FAILED, STDOUT, STDERR, EXIT = 8, 9, 10, 11, 12, 13

_HEAD = struct.Struct(">BI")
_SIZE = struct.Struct(">HH")
_COUNT = struct.Struct(">I")
_CODE = struct.Struct(">i")
_LENGTHS = {
    START: (2, _FRAME_MAX_BYTES),
    INPUT: (1, DATA_MAX_BYTES),
    INPUT_END: (0, 0),
    RESIZE: (_SIZE.size, _SIZE.size),
    SIGNAL: (1, 1),
    PING: (0, 0),
    CREDIT: (_COUNT.size, _COUNT.size),
    PONG: (0, 0),
    STARTED: (0, 0),
    FAILED: (0, DATA_MAX_BYTES),
    STDOUT: (1, DATA_MAX_BYTES),
    STDERR: (1, DATA_MAX_BYTES),
    EXIT: (_CODE.size, _CODE.size),
}


class FrameError(Exception):
    """The other side does not speak in these frames."""


def build_frame(kind: int, payload: bytes = b"") -> bytes:
    """A frame. Raises: FrameError: its payload is not of a length that this kind can have."""
    fewest, most = _LENGTHS[kind]
    if not fewest <= len(payload) <= most:
        raise FrameError(f"a frame of kind {kind} can't have {len(payload)} bytes")
    return _HEAD.pack(kind, len(payload)) + payload


def build_size(rows: int, columns: int) -> bytes:
    """The payload of RESIZE; what is no size of a terminal is cut to one."""
    return _SIZE.pack(max(0, min(rows, 0xFFFF)), max(0, min(columns, 0xFFFF)))


def parse_size(payload: bytes) -> tuple[int, int]:
    """Rows and columns."""
    rows, columns = _SIZE.unpack(payload)
    return rows, columns


def build_count(count: int) -> bytes:
    """The payload of CREDIT."""
    return _COUNT.pack(count)


def parse_count(payload: bytes) -> int:
    """The number that CREDIT gives."""
    return int(_COUNT.unpack(payload)[0])


def build_code(code: int) -> bytes:
    """The payload of EXIT."""
    return _CODE.pack(code)


def parse_code(payload: bytes) -> int:
    """The exit code, or -N for signal N."""
    return int(_CODE.unpack(payload)[0])


class Decoder:
    """Turns a byte stream, in whatever pieces it comes, into frames; holds no more than one that is not whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that `data` completes: kind and payload.

        Raises:
            FrameError: this is none.
        """
        self._buffer += data
        found = []
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._buffer, at)
            fewest, most = _LENGTHS.get(kind, (1, 0))
            if not fewest <= length <= most:
                raise FrameError(f"kind {kind} with {length} bytes is no frame")
            end = at + _HEAD.size + length
            if end > len(self._buffer):
                break
            found.append((kind, bytes(self._buffer[at + _HEAD.size : end])))
            at = end
        del self._buffer[:at]
        return found
