"""Directories of a disk: read as an archive, and built from one beside their destination.

Every step is from an open directory to a name in it, and no link is ever followed: whoever writes to the same disk at
the same time, an agent in its container, can make a walk fail but not lead it elsewhere.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_workspace.server.tarstream import END, ArchiveError, Member, Reader, pack_header, padding

CHUNK_BYTES = 1024 * 1024
# A descriptor a level is open at once.
_DEPTH_MAX = 200
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ZEROS = bytes(CHUNK_BYTES)
# What is told of the entries that are left out.
_LEFT_OUT_MAX = 20


class ChangedError(Exception):
    """What is being read is not what it was when the reading began; the message names it."""


def version_of(status: os.stat_result) -> str:
    """What is another as soon as a file is written to, or another one has its name."""
    return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"


@dataclass(frozen=True)
class Scan:
    """A directory as it is now.

    Attributes:
        version: is another as soon as anything in it is.
        archive_bytes: how long its archive is.
        file_bytes: how much its files hold.
        left_out: the first entries that hold nothing to copy: sockets, FIFOs and devices.
    """

    version: str
    archive_bytes: int
    file_bytes: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    member: Member
    status: os.stat_result
    folder_fd: int
    name: str


def scan(root_fd: int) -> Scan:
    """Look at the directory `root_fd` and all that is in it.

    Raises:
        OSError: something can't be read.
    """
    digest = hashlib.sha256()
    archive_bytes = len(END)
    file_bytes = 0
    left_out: list[str] = []
    for entry in _walk(root_fd, left_out):
        digest.update(_sign(entry))
        size = entry.member.size
        archive_bytes += len(pack_header(entry.member)) + size + -size % 512
        file_bytes += size
    return Scan(digest.hexdigest(), archive_bytes, file_bytes, tuple(left_out[:_LEFT_OUT_MAX]))


def pack(root_fd: int, version: str, offset: int = 0) -> Iterator[bytes]:
    """The archive of the directory `root_fd` from byte `offset` on, in pieces of at most 1 MiB.

    Raises:
        ChangedError: it is not, or not any more, what `scan` gave `version` of. The last bytes were not given then.
        OSError: something can't be read.
    """
    digest = hashlib.sha256()
    at = 0
    for entry in _walk(root_fd, []):
        digest.update(_sign(entry))
        header = pack_header(entry.member)
        if at + len(header) > offset:
            yield header[max(0, offset - at) :]
        at += len(header)
        size = entry.member.size
        if size and at + size > offset:
            yield from _content(entry, max(0, offset - at))
        at += size
        fill = padding(size)
        if at + len(fill) > offset:
            yield fill[max(0, offset - at) :]
        at += len(fill)
    if digest.hexdigest() != version:
        raise ChangedError("a file of the directory has changed")
    yield END[max(0, offset - at) :]


def gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about 1 MiB: each costs a hop."""
    held = bytearray()
    for piece in pieces:
        if not held and len(piece) >= CHUNK_BYTES:
            yield piece
            continue
        held += piece
        if len(held) >= CHUNK_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)


def read_file(fd: int, status: os.stat_result, offset: int = 0) -> Iterator[bytes]:
    """The bytes of an open file from `offset` on, in pieces of at most 1 MiB.

    Raises:
        ChangedError: it is not, or not any more, what `status` says. The last bytes were not given then.
        OSError: it can't be read.
    """
    data = b""
    while offset < status.st_size:
        if data:
            yield data
        data = os.pread(fd, min(CHUNK_BYTES, status.st_size - offset), offset)
        if not data:
            break
        offset += len(data)
    if version_of(os.fstat(fd)) != version_of(status):
        raise ChangedError("the file has changed")
    if data:
        yield data


def _content(entry: _Entry, offset: int) -> Iterator[bytes]:
    fd = os.open(entry.name, _OPEN_FILE, dir_fd=entry.folder_fd)
    try:
        if version_of(os.fstat(fd)) != version_of(entry.status):
            raise ChangedError(f"{entry.member.name!r} has changed")
        yield from read_file(fd, entry.status, offset)
    finally:
        os.close(fd)


def _sign(entry: _Entry) -> bytes:
    member = entry.member
    version = version_of(entry.status) if member.kind == "file" else ""
    return f"{member!r}{version}\0".encode("utf-8", "surrogateescape")


def _walk(root_fd: int, left_out: list[str]) -> Iterator[_Entry]:
    """Every entry, each directory before what is in it, names in order; `.` first."""
    status = os.fstat(root_fd)
    yield _Entry(Member(".", "directory", status.st_mode & 0o777, status.st_mtime_ns), status, root_fd, ".")
    yield from _walk_below(root_fd, "", left_out, 1)


def _walk_below(folder_fd: int, prefix: str, left_out: list[str], depth: int) -> Iterator[_Entry]:
    if depth > _DEPTH_MAX:
        raise OSError(errno.ENAMETOOLONG, f"directories within directories, more than {_DEPTH_MAX} deep", prefix)
    for name in sorted(os.listdir(folder_fd)):
        path = prefix + name
        try:
            status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
            target = os.readlink(name, dir_fd=folder_fd) if stat.S_ISLNK(status.st_mode) else ""
        except FileNotFoundError:
            continue  # removed since; whoever compares versions finds that out
        kind = _kind_of(status.st_mode)
        if kind is None:
            left_out.append(path)
            continue
        size = status.st_size if kind == "file" else 0
        member = Member(path, kind, status.st_mode & 0o777, status.st_mtime_ns, size, target)
        yield _Entry(member, status, folder_fd, name)
        if kind == "directory":
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=folder_fd)
            try:
                yield from _walk_below(fd, path + "/", left_out, depth + 1)
            finally:
                os.close(fd)


def _kind_of(mode: int) -> str | None:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else None


class NewTree:
    """A directory being built beside its destination from an archive; removed unless published.

    Published where nothing is, it appears whole. Where a directory is already, what is new goes into it, over files of
    the same names, each whole; what else is there stays. Nothing has changed there before all has arrived, and nothing
    changes if a directory and a file have the same name, or a link is in the way.

    Args:
        path: of the destination, absolute.
    """

    def __init__(self, path: Path) -> None:
        self._destination = Path(os.path.realpath(path))
        if self._destination.exists() and not self._destination.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of this name", str(path))
        make_parents(self._destination.parent)
        self.part = self._destination.with_name(f".{secrets.token_hex(8)}.part")
        self.part.mkdir(mode=0o700)
        self._root_fd = os.open(self.part, _OPEN_DIRECTORY)
        self._reader = Reader(self)
        self._folder: tuple[str, int] = ("", self._root_fd)
        self._directories: dict[str, tuple[int, int]] = {}
        self._member: Member | None = None
        self._fd = -1
        self.received = 0
        self.size = 0

    def write(self, data: bytes) -> None:
        """Take the next bytes of the archive. Raises: ArchiveError, OSError."""
        self._reader.feed(data)
        self.received += len(data)

    def finish(self) -> None:
        """It is whole, and stays aside: somebody else puts it in its place (`adopt_tree`). Raises: as `publish`."""
        self._reader.close()
        self._leave_folder()
        self._finish(self._root_fd)

    def publish(self) -> None:
        """Put the directory in its place. Raises: ArchiveError, OSError."""
        self._reader.close()
        self._leave_folder()
        if not self._destination.is_dir():
            self._finish(self._root_fd)
            self.part.rename(self._destination)
            return
        target_fd = os.open(self._destination, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            there = {"."}
            _merge(self._root_fd, target_fd, "", there, is_trial=True)
            _merge(self._root_fd, target_fd, "", there, is_trial=False)
            for path in there:  # they keep what they have
                self._directories.pop(path, None)
            self._finish(target_fd)
        finally:
            os.close(target_fd)

    def discard(self) -> None:
        """Let go of it; nothing of it stays but what was published."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._leave_folder()
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1
        shutil.rmtree(self.part, ignore_errors=True)

    def begin(self, member: Member) -> None:
        """A member of the archive begins."""
        folder, _, name = member.name.rpartition("/")
        try:
            self._make(member, self._open_folder(folder), name)
        except FileExistsError:
            raise ArchiveError("it comes twice", member.name) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
                raise ArchiveError("its directory is none of the archive's", member.name) from error
            raise

    def _make(self, member: Member, folder_fd: int, name: str) -> None:
        if member.kind == "directory":
            if member.name != ".":
                os.mkdir(name, 0o700, dir_fd=folder_fd)
            elif "." in self._directories:
                raise FileExistsError
            self._directories[member.name] = (member.mode, member.mtime_ns)
        elif member.kind == "link":
            os.symlink(member.target, name, dir_fd=folder_fd)
            times = (member.mtime_ns, member.mtime_ns)
            os.utime(name, ns=times, dir_fd=folder_fd, follow_symlinks=False)
        else:
            self._fd = os.open(name, _CREATE_FILE, 0o600, dir_fd=folder_fd)
            self._member = member

    def end(self) -> None:
        """The member is whole."""
        if self._member is None:
            return
        member, self._member = self._member, None
        finish_file(self._fd, member.size, member.mode, member.mtime_ns)
        os.close(self._fd)
        self._fd = -1

    def write_content(self, data: memoryview) -> None:
        """Content of the file that has begun."""
        write_all(self._fd, data)
        self.size += len(data)

    def _open_folder(self, path: str) -> int:
        if path != self._folder[0]:
            fd = open_beneath(self._root_fd, path)
            self._leave_folder()
            self._folder = (path, fd)
        return self._folder[1]

    def _leave_folder(self) -> None:
        if self._folder[1] != self._root_fd:
            os.close(self._folder[1])
        self._folder = ("", self._root_fd)

    def _finish(self, root_fd: int) -> None:
        """Give the directories their modes and times, the deepest first: nothing is made in them any more."""
        for path in sorted(self._directories, key=lambda path: path.count("/") + (path != "."), reverse=True):
            mode, mtime_ns = self._directories[path]
            fd = open_beneath(root_fd, path)
            try:
                os.fchmod(fd, mode)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)


def adopt_tree(part: Path, path: Path) -> None:
    """Put a directory that lies aside on the same disk in its place, as `NewTree` does. Raises: OSError."""
    destination = Path(os.path.realpath(path))
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "there is a file of this name", str(path))
    make_parents(destination.parent)
    with contextlib.ExitStack() as open_fds:
        fds = []
        for one in (part.parent, part, destination if destination.is_dir() else destination.parent):
            fds.append(
                os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if one == part else 0))
            )
            open_fds.callback(os.close, fds[-1])
        if not destination.is_dir():
            _move(part.name, fds[0], fds[2], to=destination.name)
            return
        _merge(fds[1], fds[2], "", set(), is_trial=True)
        _merge(fds[1], fds[2], "", set(), is_trial=False)
    shutil.rmtree(part)


def _move(name: str, source_fd: int, target_fd: int, *, to: str) -> None:
    """Rename; a directory that its owner must not write to can't get another parent, unless for a moment he may."""
    status = os.stat(name, dir_fd=source_fd, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode) or status.st_mode & stat.S_IWUSR:
        os.rename(name, to, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        return
    fd = os.open(name, _OPEN_DIRECTORY, dir_fd=source_fd)
    try:
        os.fchmod(fd, 0o700)
        os.rename(name, to, src_dir_fd=source_fd, dst_dir_fd=target_fd)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
    finally:
        os.close(fd)


def open_beneath(root_fd: int, path: str) -> int:
    """The directory `path` below an open one. Raises: OSError: ELOOP or ENOTDIR where a link is on the way."""
    fd = os.dup(root_fd)
    for name in path.split("/"):
        if name in ("", "."):
            continue
        try:
            below = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def write_all(fd: int, data: memoryview | bytes) -> None:
    """Append all of `data`; zeros are passed over: a file of holes stays one. `finish_file` sets its length."""
    view = memoryview(data)
    if len(view) <= len(_ZEROS) and view == _ZEROS[: len(view)]:
        os.lseek(fd, len(view), os.SEEK_CUR)
        return
    while view:
        view = view[os.write(fd, view) :]


def finish_file(fd: int, size: int, mode: int, mtime_ns: int | None) -> None:
    """Give a file that was written by `write_all` its length, mode and time."""
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)
    os.fchmod(fd, mode)
    if mtime_ns is not None:
        os.utime(fd, ns=(mtime_ns, mtime_ns))


def make_parents(directory: Path) -> None:
    """Missing parents with mode 0755: they are the user's, not the server's, whose umask is 077."""
    missing = []
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another made it meanwhile
            one.mkdir()
            one.chmod(0o755)


def _merge(source_fd: int, target_fd: int, prefix: str, there: set[str], *, is_trial: bool) -> None:
    """Move all of one directory into another. A trial moves nothing and finds what is in the way.

    Args:
        there: gets the directories that were in the other already.

    Raises:
        FileExistsError: a directory is to go where something else is, or the other way round.
    """
    for name in sorted(os.listdir(source_fd)):
        path = prefix + name
        is_directory = stat.S_ISDIR(os.stat(name, dir_fd=source_fd, follow_symlinks=False).st_mode)
        try:
            found: int | None = os.stat(name, dir_fd=target_fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            found = None
        if found is not None and is_directory != stat.S_ISDIR(found):
            raise FileExistsError(errno.EEXIST, "a directory and something else have the same name", path)
        if found is not None and is_directory:
            there.add(path)
            with contextlib.ExitStack() as open_fds:
                below = []
                for fd in (source_fd, target_fd):
                    below.append(os.open(name, _OPEN_DIRECTORY, dir_fd=fd))
                    open_fds.callback(os.close, below[-1])
                _merge(below[0], below[1], path + "/", there, is_trial=is_trial)
        elif not is_trial:
            _move(name, source_fd, target_fd, to=name)
