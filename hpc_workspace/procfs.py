"""What /proc says about processes and listeners. Reads only; works without privileges for this user's processes.

Source: proc(5), man-pages 6.9: /proc/pid/stat fields 3 (state), 4 (ppid), 22 (starttime), /proc/net/tcp.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h


@dataclass(frozen=True)
class Process:
    """A process as it is now. `start_ticks` tells it from a later one with the same id."""

    pid: int
    parent_pid: int
    state: str
    start_ticks: int
    name: str

    @property
    def is_zombie(self) -> bool:
        return self.state == "Z"


def read_process(pid: int) -> Process | None:
    """The process with this id, or None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The name is in parentheses and may hold spaces and parentheses itself.
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    return Process(pid, int(fields[1]), fields[0], int(fields[19]), head.partition("(")[2])


def read_processes() -> dict[int, Process]:
    """Every process that can be seen."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: process for pid in pids if (process := read_process(pid)) is not None}


def descendants(*root_pids: int, processes: dict[int, Process] | None = None) -> list[Process]:
    """The living and dead children of `root_pids`, their children, and so on; each root only if it is one of these.

    Args:
        processes: among which to look; None: all that can be seen now.
    """
    processes = read_processes() if processes is None else processes
    children: dict[int, list[Process]] = defaultdict(list)
    for process in processes.values():
        children[process.parent_pid].append(process)
    found: list[Process] = []
    todo = list(root_pids)
    while todo:
        born = children.get(todo.pop(), [])
        found += born
        todo += [process.pid for process in born]
    return found


def memory_bytes(pid: int) -> int:
    """The memory of a process, pages that several share split among them (Pss); 0 if it is gone or hidden. proc(5)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def environment_value(pid: int, name: str) -> str | None:
    """The value that `name` had in the environment a process was started with; None without it, or if it is hidden."""
    wanted = f"{name}=".encode()
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = next((entry for entry in entries if entry.startswith(wanted)), None)
    return None if found is None else found[len(wanted) :].decode("utf-8", "surrogateescape")


def namespace(pid: int | str, kind: str) -> str:
    """The namespace of `kind` (pid, user, mnt, net) that a process is in; empty if that is hidden. namespaces(7)."""
    return _link(f"/proc/{pid}/ns/{kind}")


def is_elsewhere(pid: int, kind: str) -> bool:
    """Whether a process is in another namespace of `kind` than this one, as far as it shows."""
    return namespace(pid, kind) not in ("", namespace("self", kind))


@dataclass(frozen=True)
class TcpSocket:
    """A TCP socket: its inode is its identity for as long as it lives."""

    inode: int
    uid: int


def tcp_listener(port: int) -> TcpSocket | None:
    """Who gets a connection to 127.0.0.1:port; None if nobody listens. The kernel prefers the most exact address."""
    found: dict[str, TcpSocket] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            address, _, number = fields[1].partition(":")
            if fields[3] == _LISTEN and int(number, 16) == port:
                found.setdefault(address, TcpSocket(inode=int(fields[9]), uid=int(fields[7])))
    return next((found[address] for address in _REACHED_BY_LOOPBACK if address in found), None)


def tcp_peer(peer: str, peer_port: int, our_port: int) -> TcpSocket | None:
    """The socket at the other end of a connection to 127.0.0.1:our_port; None if there is none any more.

    Args:
        peer: the address that it came from, as accept(2) says: any of 127.0.0.0/8.

    Raises:
        OSError: there is no /proc to look in.
    """
    for table, family, prefix in (("tcp", socket.AF_INET, ""), ("tcp6", socket.AF_INET6, "::ffff:")):
        path = Path(f"/proc/net/{table}")
        if table == "tcp6" and not path.exists():
            continue
        ours, theirs = (_hex_address(family, f"{prefix}{address}") for address in ("127.0.0.1", peer))
        wanted = (f"{theirs}:{peer_port:04X}", f"{ours}:{our_port:04X}")
        for fields in map(str.split, path.read_text().splitlines()[1:]):
            if (fields[1], fields[2]) == wanted:
                return TcpSocket(uid=int(fields[7]), inode=int(fields[9]))
    return None


def _hex_address(family: int, address: str) -> str:
    words = struct.iter_unpack("@I" if sys.byteorder == "big" else "<I", socket.inet_pton(family, address))
    return "".join(f"{word:08X}" for (word,) in words)


_IPV4_LOOPBACK = _hex_address(socket.AF_INET, "127.0.0.1")
# Those that a connection to 127.0.0.1 reaches, the most exact first.
_REACHED_BY_LOOPBACK = (
    _IPV4_LOOPBACK,
    _hex_address(socket.AF_INET6, "::ffff:127.0.0.1"),
    _hex_address(socket.AF_INET, "0.0.0.0"),  # noqa: S104 - looked for, not bound
    _hex_address(socket.AF_INET6, "::"),
)


def holds_socket(pid: int, inode: int) -> bool:
    """Whether process `pid` has the socket with this inode open."""
    wanted = f"socket:[{inode}]"
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            return any(_link(entry.path) == wanted for entry in entries)
    except OSError:
        return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def mounts_mention(pid: int, text: str) -> bool:
    """Whether `text` stands in the list of mounts that a process sees, as a source of one, say."""
    try:
        return text in Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return False


def mounts_of(pid: int | str) -> list[tuple[str, str]]:
    """Mount point and file system type of each mount that a process sees; none if it is gone. proc(5), mountinfo."""
    try:
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    except OSError:
        return []
    rows = (line.split() for line in lines)
    return [(_unescaped(fields[4]), fields[fields.index("-") + 1]) for fields in rows]


def _unescaped(text: str) -> str:
    """A path of mountinfo, where blanks, tabs, newlines and backslashes stand as octal numbers; proc(5)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounts_below(path: str) -> list[str]:
    """Mount points at or below `path` in this mount namespace."""
    real = os.path.realpath(path)  # as the kernel lists them
    points = (point for point, _ in mounts_of("self"))
    return [point for point in points if point == real or point.startswith(real.rstrip("/") + "/")]
