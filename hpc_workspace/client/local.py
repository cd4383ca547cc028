"""This side's end of a transfer: what is read from our disk, and what grows on it until it is whole.

The rules for directories are those of the bundled server's own modules, which need nothing but the standard library:
what is refused there is refused here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from hpc_workspace.errors import FileChangedError, FileError, UnsafeFileError, WorkspaceError
from hpc_workspace.server.newfile import NewFile
from hpc_workspace.server.tarstream import ArchiveError
from hpc_workspace.server.trees import CHUNK_BYTES, ChangedError, NewTree, gathered, pack, read_file, scan, version_of

# Told how many bytes have been moved, and of how many; None: nobody knows.
Progress = Callable[[int, int | None], None]

_REMEDIES = {
    errno.ENOSPC: "Make room there, or choose another file system. Nothing of it was left.",
    errno.EDQUOT: "Your quota there is used up. Nothing of it was left.",
}


class Source(Protocol):
    """What is uploaded. `chunks` gives its bytes from `offset` on, as often as it is asked.

    Attributes:
        kind: file, or directory: its bytes are an archive then.
        size: of all its bytes; None: nobody knows.
        content_bytes: of it, what is in files.

    `chunks` raises ChangedError where it is not what it was when it was opened, and OSError.
    """

    @property
    def kind(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def content_bytes(self) -> int: ...
    @property
    def mode(self) -> int: ...
    @property
    def mtime_ns(self) -> int | None: ...
    def chunks(self, offset: int, /) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class DiskSource:
    """A file or a directory of ours, open. `left_out`: what of a directory has nothing to copy.

    Raises:
        FileError: it can't be read, or is neither.
    """

    def __init__(self, path: Path) -> None:
        with local_errors(path, "read"):
            # Not O_NOFOLLOW: what the user names himself may be a link.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._open(path)
            except BaseException:
                os.close(self.fd)
                raise

    def _open(self, path: Path) -> None:
        self._status = os.fstat(self.fd)
        self.mode, self.mtime_ns = self._status.st_mode & 0o777, self._status.st_mtime_ns
        self.size: int | None
        self.left_out: tuple[str, ...] = ()
        if stat.S_ISDIR(self._status.st_mode):
            found = scan(self.fd)
            self.kind, self.size, self.content_bytes = "directory", found.archive_bytes, found.file_bytes
            self._version, self.left_out = found.version, found.left_out
        elif stat.S_ISREG(self._status.st_mode):
            self.kind, self.size, self.content_bytes = "file", self._status.st_size, self._status.st_size
        else:
            raise OSError(errno.EINVAL, "it is neither a file nor a directory")

    def chunks(self, offset: int) -> Iterator[bytes]:
        """Its bytes from `offset` on."""
        if self.kind == "directory":
            return gathered(pack(self.fd, self._version, offset))
        return read_file(self.fd, self._status, offset)

    def require_unchanged(self) -> None:
        """Raises: ChangedError: a file is not what it was when it was opened."""
        if version_of(os.fstat(self.fd)) != version_of(self._status):
            raise ChangedError("the file has changed")

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


class BytesSource:
    """Bytes in memory, as a file."""

    kind = "file"
    mtime_ns = None

    def __init__(self, data: bytes, mode: int) -> None:
        self._data = data
        self.mode = mode
        self.size: int | None = len(data)
        self.content_bytes = len(data)

    def chunks(self, offset: int) -> Iterator[bytes]:
        """Its bytes from `offset` on, in pieces: one large buffer is sliced anew for every packet further down."""
        for at in range(offset, len(self._data), CHUNK_BYTES):
            yield self._data[at : at + CHUNK_BYTES]

    def close(self) -> None:
        """Nothing."""


class PipeSource:
    """A file whose bytes come once, from a pipe. `content_bytes` is what has come yet."""

    kind = "file"
    size = None
    mode = 0o644
    mtime_ns = None

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self.content_bytes = 0

    def chunks(self, offset: int) -> Iterator[bytes]:
        """What comes. Raises: OSError: some of it is wanted again."""
        if offset != self.content_bytes:
            raise OSError(errno.ESPIPE, "the connection broke, and a pipe can't be read again")
        while data := self._pipe.read(CHUNK_BYTES):
            self.content_bytes += len(data)
            yield data

    def close(self) -> None:
        """Nothing: it is the caller's."""


@dataclass(frozen=True)
class Found:
    """What a workspace has at a path.

    Attributes:
        kind: file or directory.
        content_bytes: in files.
        size: of the stream that it comes as.
        version: another as soon as it changes.
    """

    kind: str
    mode: int
    mtime_ns: int | None
    size: int
    content_bytes: int
    version: str
    left_out: tuple[str, ...] = field(default=())


class Landing(Protocol):
    """Where a download grows. `publish` puts it in its place, `discard` lets go of it; both may be called twice."""

    @property
    def size(self) -> int: ...
    @property
    def received(self) -> int: ...
    def write(self, data: bytes, /) -> None: ...
    def publish(self) -> None: ...
    def discard(self) -> None: ...


class DiskLanding:
    """A file or a directory that appears at `path`, whole or not at all. A link there is replaced, not followed.

    Raises (all methods):
        FileError: our disk says no.
        UnsafeFileError: what comes is not to be had.
    """

    def __init__(self, path: Path, found: Found) -> None:
        self.path = path
        with local_errors(path, "written"):
            self._new: NewFile | NewTree
            if found.kind == "directory":
                self._new = NewTree(path)
            else:
                self._new = NewFile(path, found.mode & 0o777, found.mtime_ns, follow=False)

    @property
    def received(self) -> int:
        return self._new.received

    @property
    def size(self) -> int:
        return self._new.size

    @property
    def fd(self) -> int:
        """Of a file that grows."""
        assert isinstance(self._new, NewFile)
        return self._new.fd

    def note_written(self, size: int) -> None:
        """So many bytes were written to `fd` by somebody else."""
        self._new.size += size

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        with local_errors(self.path, "written"):
            self._new.write(data)

    def publish(self) -> None:
        """Put it in its place."""
        with local_errors(self.path, "written"):
            self._new.publish()

    def discard(self) -> None:
        """Let go of it."""
        self._new.discard()


class BytesLanding:
    """Bytes in memory."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.size = 0

    @property
    def received(self) -> int:
        return self.size

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self.data += data
        self.size += len(data)

    def publish(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""


class PipeLanding:
    """Bytes that go on at once, to a pipe. What was given can't be taken back."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self.size = 0

    @property
    def received(self) -> int:
        return self.size

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._pipe.write(data)
        self.size += len(data)

    def publish(self) -> None:
        """It is whole."""
        self._pipe.flush()

    def discard(self) -> None:
        """Raises: FileChangedError: it would have to begin anew."""


@contextlib.contextmanager
def local_errors(path: Path | str, verb: str) -> Iterator[None]:
    """What our own disk says, as one of our errors."""
    name = printable(str(path))
    try:
        yield
    except WorkspaceError:
        raise
    except ArchiveError as error:
        raise UnsafeFileError(
            f"What comes from the workspace for {name} is refused: {printable(error.member)!r}: {error}.",
            path=error.member,
            evidence="Something inside the workspace made it, or took the place of its agent server.",
            remedy="Nothing was written. Take the files that you need one by one.",
        ) from error
    except ChangedError as error:
        raise FileChangedError(
            f"{name} changes while it is read: {error}.", path=str(path), remedy="Stop what writes to it, or copy it."
        ) from error
    except OSError as error:
        below = "" if error.filename in (None, str(path)) else f" At {printable(str(error.filename))!r}."
        raise FileError(
            f"{name} can't be {verb}: {error.strerror or error}.{below}",
            path=str(path),
            errno=error.errno or 0,
            remedy=_REMEDIES.get(error.errno or 0, ""),
        ) from error


def printable(path: str) -> str:
    """A path for a message: what is not UTF-8 and what moves a cursor is escaped."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


__all__ = [
    "BytesLanding", "BytesSource", "DiskLanding", "DiskSource", "Found", "Landing", "PipeLanding", "PipeSource",
    "Progress", "Source", "local_errors", "printable",
]  # fmt: skip


def told(source: Source, offset: int, path: str, on_progress: Progress) -> Iterator[bytes]:
    """The source's bytes; its errors as ours, and how far it is told."""
    pieces = source.chunks(offset)
    at = offset
    while True:
        with local_errors(getattr(source, "path", path), "read"):
            piece = next(pieces, b"")
        if not piece:
            return
        yield piece
        at += len(piece)
        on_progress(at, source.size)
