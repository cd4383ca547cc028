"""A file that is being written beside its destination: it appears whole or not at all."""

import errno
import os
import secrets
import shutil
import stat
from pathlib import Path

from hpc_workspace.server.trees import finish_file, make_parents, write_all

_FILE_MODE = 0o644
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class NewFile:
    """Written aside; as it goes, `discard` removes it unless it was published.

    Args:
        path: absolute; missing parents are made.
        mode: None keeps that of an existing file, else 0644.
        mtime_ns: None: now.
        follow: whether a symbolic link at `path` is followed, as `open` would; else it is replaced.
    """

    def __init__(self, path: Path, mode: int | None, mtime_ns: int | None, *, follow: bool = True) -> None:
        self.destination = Path(os.path.realpath(path)) if follow else Path(os.path.realpath(path.parent), path.name)
        existing = _existing_mode(self.destination)
        self.mode = mode if mode is not None else existing
        self.mtime_ns = mtime_ns
        self.size = 0
        make_parents(self.destination.parent)
        self.part = self.destination.with_name(f".{secrets.token_hex(8)}.part")
        self.fd = os.open(self.part, _CREATE, 0o600)

    @property
    def received(self) -> int:
        """How many bytes have come."""
        return self.size

    def write(self, data: bytes) -> None:
        """Append all of `data`."""
        write_all(self.fd, data)
        self.size += len(data)

    def publish(self) -> None:
        """Put the file in its place."""
        finish_file(self.fd, self.size, self.mode, self.mtime_ns)
        replace(self.part, self.destination)

    def discard(self) -> None:
        """Let go of it; nothing of it stays but what was published."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.part.unlink(missing_ok=True)


def replace(part: Path, destination: Path) -> None:
    """Rename a file over what is there. A file that is itself a mount point can only be rewritten."""
    try:
        part.replace(destination)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(part, destination)


def _existing_mode(path: Path) -> int:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return _FILE_MODE
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Path is a directory")
    if stat.S_ISLNK(mode):
        return _FILE_MODE
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Path is not a regular file")
    return stat.S_IMODE(mode)
