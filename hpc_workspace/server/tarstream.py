"""Directories as a stream of bytes: POSIX pax archives, written and read piece by piece, in constant memory.

The writer gives files, directories and symbolic links, with modes, times to the nanosecond and names of any bytes, and
no owners. The reader takes that, and what GNU tar and busybox write of the same; the other end may be hostile, so that
it refuses everything else by name: hard links, devices, FIFOs, sparse maps, absolute names and `..`.

Python's own `tarfile` is used for single headers alone: it reads an extended header of any size into memory.
Source: pax(1) of POSIX.1-2017, "pax Interchange Format"; GNU tar 1.35, "Basic Tar Format".
"""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
END = bytes(2 * BLOCK)
_NS = 10**9
# Longer than any path and link target that Linux takes (PATH_MAX is 4096) in any spelling.
_EXTENSION_MAX_BYTES = 64 * 1024
_SIZE_MAX_BYTES = 1 << 62
_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "link",
}
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse map",
}


class ArchiveError(Exception):
    """A stream that is no archive of ours, or a member of it that is not to be had; `member` is its name, or empty."""

    def __init__(self, detail: str, member: str = "") -> None:
        self.member = member
        super().__init__(detail)


@dataclass(frozen=True)
class Member:
    """One entry.

    Attributes:
        name: relative; bytes that are not UTF-8 as lone surrogates; `.` is the directory itself.
        kind: file, directory or link.
        mode: the nine permission bits: nothing that comes from elsewhere runs as somebody else.
        size: bytes of content; 0 but for files.
        target: a link's.
    """

    name: str
    kind: str
    mode: int
    mtime_ns: int
    size: int = 0
    target: str = ""


class Sink(Protocol):
    """What takes the members: each is begun, gets its content, if any, and is ended."""

    def begin(self, member: Member, /) -> None: ...
    def write_content(self, data: memoryview, /) -> None: ...
    def end(self) -> None: ...


def pack_header(member: Member) -> bytes:
    """The header blocks of a member; its content follows, filled up to whole blocks (`padding`)."""
    info = tarfile.TarInfo(member.name)
    info.type = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}[member.kind]
    info.mode, info.size, info.linkname = member.mode, member.size, member.target
    info.mtime = max(0, member.mtime_ns // _NS)
    info.pax_headers = {"mtime": _seconds(member.mtime_ns)}
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What follows `size` bytes of content."""
    return bytes(-size % BLOCK)


def _seconds(time_ns: int) -> str:
    sign, value = ("-", -time_ns) if time_ns < 0 else ("", time_ns)
    return f"{sign}{value // _NS}.{value % _NS:09d}"


def _nanoseconds(text: str) -> int:
    whole, _, part = text.removeprefix("-").partition(".")
    value = int(whole or "0") * _NS + int(part[:9].ljust(9, "0") or "0")
    return -value if text.startswith("-") else value


class Reader:
    """Reads an archive as it comes, in pieces of any size.

    Args:
        sink: gets the members.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held = bytearray()
        self._wanted = BLOCK
        self._then: Callable[[bytes], None] = self._on_header
        self._content_left = 0
        self._padding_left = 0
        self._extensions: dict[str, str] = {}
        self._end_blocks = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            ArchiveError: they are not what an archive goes on with, or a member is refused.
            OSError: of the sink.
        """
        view = memoryview(data)
        while view and not self.is_over:
            if self._content_left:
                taken = min(self._content_left, len(view))
                self._sink.write_content(view[:taken])
                self._content_left -= taken
                if not self._content_left:
                    self._sink.end()
            elif self._padding_left:
                taken = min(self._padding_left, len(view))
                self._padding_left -= taken
            else:
                taken = min(self._wanted - len(self._held), len(view))
                self._held += view[:taken]
                if len(self._held) == self._wanted:
                    block = bytes(self._held)
                    self._held.clear()
                    self._then(block)
            view = view[taken:]

    @property
    def is_over(self) -> bool:
        """Whether the archive has come to its end."""
        return self._end_blocks == 2

    def close(self) -> None:
        """Raises: ArchiveError: the archive is not whole."""
        if not self.is_over:
            raise ArchiveError("the archive ends in its middle")

    def _on_header(self, block: bytes) -> None:
        if not any(block):
            self._end_blocks += 1
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ArchiveError(f"what should be a header is none: {error}") from error
        if self._end_blocks or not 0 <= info.size < _SIZE_MAX_BYTES:
            raise ArchiveError("a header makes no sense", info.name)
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            self._want_extension(info)
        else:
            self._on_member(info)

    def _want_extension(self, info: tarfile.TarInfo) -> None:
        if not 0 < info.size <= _EXTENSION_MAX_BYTES:
            raise ArchiveError(f"an extended header has {info.size} bytes", info.name)
        self._wanted = info.size + -info.size % BLOCK

        def on_extension(data: bytes) -> None:
            self._wanted, self._then = BLOCK, self._on_header
            text = data[: info.size]
            if info.type == tarfile.XGLTYPE:
                return  # of all that follow: a comment, such as git's
            if info.type == tarfile.XHDTYPE:
                self._extensions.update(_parse_records(text))
            else:
                key = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
                self._extensions[key] = text.rstrip(b"\0").decode("utf-8", "surrogateescape")

        self._then = on_extension

    def _on_member(self, info: tarfile.TarInfo) -> None:
        extensions, self._extensions = self._extensions, {}
        member = _make_member(info, extensions)
        self._content_left, self._padding_left = member.size, -member.size % BLOCK
        self._sink.begin(member)
        if not member.size:
            self._sink.end()


def _parse_records(data: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n`, over and over."""
    records = {}
    while data:
        length, _, _rest = data.partition(b" ")
        if not length.isdigit() or len(length) > 6 or not len(length) + 2 < int(length) <= len(data):
            raise ArchiveError("an extended header is broken")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, found, value = record.partition(b"=")
        if not found or not value.endswith(b"\n"):
            raise ArchiveError("an extended header is broken")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
    return records


def _make_member(info: tarfile.TarInfo, extensions: dict[str, str]) -> Member:
    name = _checked_name(extensions.get("path", info.name))
    if info.type not in _KINDS or any(key.startswith("GNU.sparse.") for key in extensions):
        raise ArchiveError(f"it is {_REFUSED.get(info.type, 'of a kind that nobody asked for')}", name)
    kind = _KINDS[info.type]
    target = extensions.get("linkpath", info.linkname) if kind == "link" else ""
    if kind == "link" and (not target or "\0" in target):
        raise ArchiveError("a link leads nowhere", name)
    try:
        size = int(extensions.get("size", info.size)) if kind == "file" else 0
        mtime_ns = _nanoseconds(extensions["mtime"]) if "mtime" in extensions else int(info.mtime) * _NS
    except ValueError as error:
        raise ArchiveError(f"a number is none: {error}", name) from error
    if not 0 <= size < _SIZE_MAX_BYTES or (kind != "file" and info.size):
        raise ArchiveError("its size makes no sense", name)
    return Member(name, kind, info.mode & 0o777, mtime_ns, size, target)


def _checked_name(name: str) -> str:
    """The name without what says nothing: `./` and a closing slash."""
    if "\0" in name or name.startswith("/"):
        raise ArchiveError("its name is absolute" if name.startswith("/") else "its name has a NUL", name)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ArchiveError("its name leads out of the directory", name)
    return "/".join(parts) or "."
