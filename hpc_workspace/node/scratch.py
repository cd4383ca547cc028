"""The workspace's 0700 directory on the node's own disk: sockets, the container's writable space, its key file."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hpc_workspace import procfs
from hpc_workspace.errors import ContainerError

_LAST_RESORT = "/tmp"  # noqa: S108 - made 0700 below
_PREFIX = "hpcws-"
_OWNER = "owner"
_CANDIDATES = ("SLURM_TMPDIR", "TMPDIR")
# unix(7): sun_path is 108 bytes; the longest name made below is 20.
_LONGEST_SOCKET_BASE = 80


def choose_base(environment: Mapping[str, str]) -> Path:
    """The node-local directory with the most room: `$SLURM_TMPDIR`, `$TMPDIR` or `/tmp`.

    Raises:
        ContainerError: none of them can be written.
    """
    named = [*(environment[name] for name in _CANDIDATES if environment.get(name)), _LAST_RESORT]
    usable = [path for path in map(Path, named) if os.access(path, os.W_OK | os.X_OK)]
    if not usable:
        raise ContainerError("No directory for scratch on this node can be written.", evidence=", ".join(named))
    return max(usable, key=lambda path: shutil.disk_usage(path).free)


def _owner_mark(process: procfs.Process) -> str:
    """A process's name for ever: its id alone may be given to another one day."""
    return f"{process.pid} {process.start_ticks}"


def remove_stale(base: Path) -> list[Path]:
    """Remove this user's scratch directories below `base` whose node program is dead; returns them.

    One that says no owner is left alone: it may be in the making.
    """
    removed = []
    for path in base.glob(f"{_PREFIX}*"):
        try:
            mark = (path / _OWNER).read_text()
            is_ours = path.lstat().st_uid == os.getuid() and not path.is_symlink()
        except (OSError, ValueError):
            continue
        pid = mark.partition(" ")[0]
        owner = procfs.read_process(int(pid)) if pid.isdigit() else None
        if is_ours and pid.isdigit() and (owner is None or _owner_mark(owner) != mark):
            remove_tree(path)
            removed.append(path)
    return removed


class Scratch:
    """Directories of one workspace on this node. Made at once, removed by `remove`."""

    def __init__(self, base: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self.sockets = self.path
        if len(os.fsencode(self.path)) > _LONGEST_SOCKET_BASE:
            self.sockets = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_LAST_RESORT))
        own = procfs.read_process(os.getpid())
        for path in {self.path, self.sockets}:
            (path / _OWNER).write_text(_owner_mark(own) if own else "")
        self.run = self._made(self.sockets, "run")
        self.private = self._made(self.path, "private")
        self.workspace = self._made(self.path, "workspace")
        self.tmp = self._made(self.path, "tmp")
        self.overlay = self._made(self.path, "overlay")

    @staticmethod
    def _made(parent: Path, name: str) -> Path:
        path = parent / name
        path.mkdir(mode=0o700)
        return path

    @property
    def door_socket(self) -> Path:
        return self.sockets / "door.sock"

    @property
    def server_socket(self) -> Path:
        return self.run / "server.sock"

    def write_private(self, name: str, text: str) -> Path:
        """Write a 0600 file that only this user can reach."""
        path = self.private / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        return path

    def remove(self) -> list[str]:
        """Remove all of it. Returns what could not be removed: paths, empty if nothing is left."""
        for path in {self.path, self.sockets}:
            remove_tree(path)
        return [str(path) for path in sorted({self.path, self.sockets}) if path.exists()]


def remove_tree(path: Path) -> None:
    """Remove a tree as far as this user can, opening directories that were closed on the way (overlay's `work`)."""

    def open_and_retry(function: object, name: str, error: object) -> None:
        with contextlib.suppress(OSError):
            for closed in (Path(name).parent, Path(name)):
                if stat.S_ISDIR(closed.lstat().st_mode):
                    closed.chmod(0o700)
            shutil.rmtree(name) if Path(name).is_dir() and not Path(name).is_symlink() else Path(name).unlink()

    if path.exists():
        # onerror is deprecated in 3.12 for onexc, which 3.11 does not have; both call with three arguments.
        if sys.version_info >= (3, 12):
            shutil.rmtree(path, onexc=open_and_retry)
        else:
            shutil.rmtree(path, onerror=open_and_retry)
