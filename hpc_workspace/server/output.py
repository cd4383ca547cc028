"""What a command wrote to one of its streams: the beginning in memory, all of it in a file once it is large.

One log serves everyone: the result, the events, and any number of followers, each at his own offset.
"""

import base64
import os
from pathlib import Path

MEMORY_BYTES = 8 * 1024 * 1024
# How far a follower may be behind before the command's pipe is left unread.
WINDOW_BYTES = 1024 * 1024
# A runaway `yes` must not fill the node's disk.
SPOOL_BYTES = 4 * 1024 * 1024 * 1024
_PIECE_BYTES = 256 * 1024


class OutputLog:
    """Bytes of one stream, in order. Nothing here awaits: the spool is on node-local disk."""

    def __init__(self, spool_file: Path, *, memory_bytes: int = MEMORY_BYTES, spool_bytes: int = SPOOL_BYTES) -> None:
        self.total = 0
        self._memory_bytes = memory_bytes
        self._spool_bytes = spool_bytes
        self._spool_file = spool_file
        self._spool_fd: int | None = None
        self._spooled = 0
        self._is_spool_over = False
        self._head = bytearray()
        self._tail = bytearray()

    @property
    def is_truncated(self) -> bool:
        """Whether memory holds only the beginning."""
        return self.total > len(self._head)

    @property
    def file(self) -> str | None:
        """The file with the whole text, where there is one (up to its own limit: compare its size with `total`)."""
        return str(self._spool_file) if self._spooled else None

    def head(self, start: int = 0, end: int | None = None) -> bytes:
        """A part of what is in memory."""
        return bytes(self._head[start:end])

    @property
    def head_size(self) -> int:
        """Bytes in memory."""
        return len(self._head)

    def append(self, data: bytes) -> None:
        """Add what has been read."""
        room = self._memory_bytes - len(self._head)
        self._head += data[:room]
        self.total += len(data)
        if self.total > self._memory_bytes:
            self._spool(data, room)

    def read_from(self, offset: int) -> tuple[int, bytes]:
        """The next piece at or after `offset`, and the offset behind it; a gap only where the spool was full."""
        if offset < len(self._head):
            data = self.head(offset, offset + _PIECE_BYTES)
        elif offset < self._spooled and self._spool_fd is not None:
            data = os.pread(self._spool_fd, min(_PIECE_BYTES, self._spooled - offset), offset)
        else:
            tail_start = self.total - len(self._tail)
            offset = max(offset, tail_start)
            data = bytes(self._tail[offset - tail_start :][:_PIECE_BYTES])
        return offset + len(data), data

    def read_many(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Up to `limit` bytes at or after `offset`, and where they begin: later than `offset` only after a gap."""
        end, data = self.read_from(offset)
        start = end - len(data)
        found = bytearray(data[:limit])
        while data and len(found) < limit:
            behind = start + len(found)
            end, data = self.read_from(behind)
            if end - len(data) != behind:
                break
            found += data[: limit - len(found)]
        return start, bytes(found)

    def discard(self) -> None:
        """Free the file; the object is not used afterwards."""
        if self._spool_fd is not None:
            os.close(self._spool_fd)
            self._spool_fd = None
            self._spool_file.unlink(missing_ok=True)

    def _spool(self, data: bytes, room: int) -> None:
        try:
            if self._spool_fd is None and not self._is_spool_over:
                self._open_spool()
                data = data[max(room, 0) :]
            if not self._is_spool_over:
                self._write(data)
        except OSError:  # disk full: the command goes on, followers read from the tail, `total` tells what is missing
            self._is_spool_over = True
        if self._is_spool_over:
            self._keep_tail(data)

    def _open_spool(self) -> None:
        self._spool_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._spool_fd = os.open(self._spool_file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._write(bytes(self._head))

    def _write(self, data: bytes) -> None:
        if self._spool_fd is None:
            return
        view = memoryview(data)[: max(0, self._spool_bytes - self._spooled)]
        self._is_spool_over = len(view) < len(data)
        while view:
            written = os.write(self._spool_fd, view)
            self._spooled += written
            view = view[written:]

    def _keep_tail(self, data: bytes) -> None:
        self._tail += data
        if len(self._tail) > 4 * WINDOW_BYTES:
            del self._tail[: -2 * WINDOW_BYTES]


def whole_characters(data: bytes) -> int:
    """How many leading bytes of `data` do not cut a UTF-8 character at the end (invalid bytes count as whole)."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if length > back else len(data)
    return len(data)


def as_fields(name: str, data: bytes) -> dict[str, str | None]:
    """`name` as text (null when empty) and `name_b64`, which is null unless the text could not carry the bytes."""
    try:
        return {name: data.decode("utf-8") or None, f"{name}_b64": None}
    except UnicodeDecodeError:
        return {name: data.decode("utf-8", "replace"), f"{name}_b64": base64.b64encode(data).decode("ascii")}
