"""A directory that is here and in the workspace: bytes go by way of it, and not through the connection.

Only bytes: what a file is called, and what it replaces, is the workspace's own to do, so that its node sees it at once
and it comes out as by the other way. To the workspace, they are written to a new file at the top of the directory,
which the server then renames. From it, a file is read only if it is, by inode, size and time, what the server has at
that path; a directory only if the server's own look at all that is in it comes to the same. Anything else goes through
the connection.

An agent may change links under our hands all the time: every step is from an open directory to a name in it, no link
is followed, and only files that are new or known are opened.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from hpc_workspace.client.local import DiskLanding, DiskSource, Found, Landing, Progress, Source, local_errors
from hpc_workspace.errors import FileError, ServerResponseError
from hpc_workspace.record import Record
from hpc_workspace.server.trees import (
    ChangedError,
    NewTree,
    gathered,
    open_beneath,
    pack,
    read_file,
    scan,
    version_of,
    write_all,
)

log = logging.getLogger(__name__)

# Below it the exchange about a file costs more than its bytes.
SMALL_BYTES = 64 * 1024
_COPY_BYTES = 32 * 1024 * 1024
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# copy_file_range(2): what says that these two files can't be copied so.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)


class NotSharedError(Exception):
    """The server does not see what we do."""


class Server(Protocol):
    """What a server is asked: `identify` what is at a path, and to put a `part` in its place."""

    def identify(self, path: str, /, *, kind: str) -> str: ...
    def publish(self, part: str, source: Source, path: str, /) -> None: ...


def shared_mount(record: Record) -> SharedMount | None:
    """The directory of a workspace that may be here too; None: there is none."""
    if record.mount_dir is None:
        return None
    inside = record.mount_dir if record.runtime == "process" else "/workspace"
    return SharedMount(Path(record.mount_dir), inside)


class SharedMount:
    """A directory that may be the same here and in the workspace; whether it is, is asked once.

    Args:
        outside: where it is on this side, if it is.
        inside: where the workspace has it.
    """

    def __init__(self, outside: Path, inside: str) -> None:
        self._outside = outside
        self._inside = inside.rstrip("/")
        self._is_shared: bool | None = None

    def put(self, server: Server, source: Source, path: str, on_progress: Progress) -> bool:
        """Bring a file or a directory to `path`. False: this is not the way; nothing has happened then.

        Raises:
            FileError: our disk, or the workspace's, says no; nothing of it was left.
        """
        if self._below(path) is None or source.size is None or source.size < SMALL_BYTES:
            return False
        with contextlib.ExitStack() as stack:
            try:
                root_fd = stack.enter_context(_opened(self._outside))
                if not self._is_proven(server, root_fd):
                    return False
                part = self._write_aside(source, root_fd, stack, on_progress)
            except OSError as error:
                if isinstance(error, FileError):
                    raise
                log.info("%s is not used: %s", self._outside, error)
                return False
            try:
                server.publish(f"{self._inside}/{part}", source, path)
            except NotSharedError as error:
                log.info("%s is not used: %s", self._outside, error)
                self._is_shared = False
                return False
        on_progress(source.size, source.size)
        return True

    def _write_aside(self, source: Source, root_fd: int, stack: contextlib.ExitStack, on_progress: Progress) -> str:
        """Write the source at the top of the directory. Returns its name there; `stack` removes what is left of it.

        Raises:
            OSError: nothing can be made there; FileError: it can't be written or read to its end.
        """
        if source.kind == "directory":
            tree = NewTree(self._outside / f"{secrets.token_hex(8)}")
            stack.callback(tree.discard)
            with local_errors(self._outside, "written"):
                for piece in source.chunks(0):
                    tree.write(piece)
                    on_progress(tree.received, source.size)
                tree.finish()
            return tree.part.name
        name = f".{secrets.token_hex(8)}.part"
        fd = os.open(name, _CREATE, 0o600, dir_fd=root_fd)
        stack.callback(_unlink, name, root_fd)
        try:
            with local_errors(self._outside, "written"):
                _copy_source(source, fd, on_progress)
        finally:
            os.close(fd)  # what was written is on the file server when it is closed
        return name

    def get(self, server: Server, path: str, land: Callable[[Found], Landing], on_progress: Progress) -> int | None:
        """Bring the file or directory at `path` here. Returns the bytes of its files; None: this is not the way.

        Raises:
            FileError: our disk says no; nothing of it was left.
        """
        below = self._below(path)
        if below is None or self._is_shared is False:
            return None
        try:
            with _opened(self._outside) as root_fd, _opened_beneath(root_fd, below) as (fd, status):
                found = _find(fd, status)
                if found is None or server.identify(path, kind=found.kind) != _identity(found, status):
                    return None
                landing = land(found)
                try:
                    _copy_found(fd, status, found, landing, on_progress)
                    landing.publish()
                finally:
                    landing.discard()
                return landing.size
        except (ChangedError, ServerResponseError) as error:
            log.info("%s is not used for %r: %s", self._outside, path, error)
            return None
        except OSError as error:
            if isinstance(error, FileError):
                raise
            log.info("%s is not used for %r: %s", self._outside, path, error)
            return None

    def _below(self, path: str) -> str | None:
        """The part of `path` below the directory; None where it is elsewhere, or may be."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        inside = self._inside.strip("/").split("/")
        if ".." in parts or parts[: len(inside)] != inside or len(parts) == len(inside):
            return None
        return "/".join(parts[len(inside) :])

    def _is_proven(self, server: Server, root_fd: int) -> bool:
        """Whether the server sees a file that we have just made, under a name that nobody can know."""
        if self._is_shared is None:
            name = f".{secrets.token_hex(16)}.part"
            fd = os.open(name, _CREATE, 0o600, dir_fd=root_fd)
            try:
                status = os.fstat(fd)
                found = _as_found(status, "file", version_of(status), status.st_size)
                self._is_shared = server.identify(f"{self._inside}/{name}", kind="file") == _identity(found, status)
            except ServerResponseError:
                self._is_shared = False
            finally:
                os.close(fd)
                _unlink(name, root_fd)
            log.info("%s is %sthe same here and in the workspace", self._outside, "" if self._is_shared else "not ")
        return self._is_shared


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened_beneath(root_fd: int, path: str) -> Iterator[tuple[int, os.stat_result]]:
    folder, _, name = path.rpartition("/")
    folder_fd = open_beneath(root_fd, folder)
    try:
        fd = os.open(name, _OPEN, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    try:
        yield fd, os.fstat(fd)
    finally:
        os.close(fd)


def _find(fd: int, status: os.stat_result) -> Found | None:
    """What is open; None where it does not go this way."""
    kind = {0o100000: "file", 0o040000: "directory"}.get(status.st_mode & 0o170000)
    if kind == "file" and status.st_size >= SMALL_BYTES:
        return _as_found(status, kind, version_of(status), status.st_size)
    if kind == "directory":
        seen = scan(fd)
        found = _as_found(status, kind, seen.version, seen.archive_bytes)
        return Found(**(vars(found) | {"content_bytes": seen.file_bytes, "left_out": seen.left_out}))
    return None


def _as_found(status: os.stat_result, kind: str, version: str, size: int) -> Found:
    return Found(
        kind=kind,
        mode=status.st_mode & 0o777,
        mtime_ns=status.st_mtime_ns,
        size=size,
        content_bytes=size,
        version=version,
    )


def _identity(found: Found, status: os.stat_result) -> str:
    """As `Server.identify` gives it."""
    if found.kind == "directory":
        return found.version
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _copy_found(fd: int, status: os.stat_result, found: Found, landing: Landing, on_progress: Progress) -> None:
    if found.kind == "directory":
        for piece in gathered(pack(fd, found.version)):
            landing.write(piece)
            on_progress(landing.received, found.size)
    elif isinstance(landing, DiskLanding):
        with local_errors(landing.path, "written"):
            for count in _copy(fd, landing.fd, status.st_size):
                landing.note_written(count)
                on_progress(landing.received, found.size)
        if version_of(os.fstat(fd)) != found.version or landing.received != found.size:
            raise ChangedError("the file has changed")
    else:
        # To memory or a pipe: looked at before the first byte is given, and again after the last.
        for piece in read_file(fd, status):
            landing.write(piece)
            on_progress(landing.received, found.size)


def _copy_source(source: Source, fd: int, on_progress: Progress) -> None:
    done = 0
    if isinstance(source, DiskSource):
        os.lseek(source.fd, 0, os.SEEK_SET)
        for count in _copy(source.fd, fd, source.size or 0):
            done += count
            on_progress(done, source.size)
        source.require_unchanged()
    else:
        for piece in source.chunks(0):
            write_all(fd, piece)
            done += len(piece)
        os.ftruncate(fd, done)
    if done != source.size:
        raise ChangedError("the file has changed")


def _copy(source_fd: int, target_fd: int, size: int) -> Iterator[int]:
    """Copy up to `size` bytes, inside the kernel where it can. Gives how many each step moved."""
    in_kernel = hasattr(os, "copy_file_range")
    while size > 0:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(source_fd, target_fd, min(size, _COPY_BYTES))
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
                in_kernel = False
                continue
        else:
            data = os.read(source_fd, min(size, 1024 * 1024))
            view = memoryview(data)
            while view:
                view = view[os.write(target_fd, view) :]
            count = len(data)
        if not count:
            return
        size -= count
        yield count


def _unlink(name: str, folder_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder_fd)
