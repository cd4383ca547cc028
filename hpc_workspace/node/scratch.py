"""The workspace's 0700 directory on the node's own disk: sockets, the container's writable space, its key file."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpc_workspace import clock, processes
from hpc_workspace.errors import ContainerError, PrerequisiteError
from hpc_workspace.owner import Owner

_LAST_RESORT = "/tmp"  # noqa: S108 - made 0700 below
_PREFIX = "hpcws-"
_OWNER = "owner"
_OWNER_MAX_BYTES = 1024
_CANDIDATES = ("SLURM_TMPDIR", "TMPDIR")
# unix(7): sun_path is 108 bytes; the longest name made below is 20.
_LONGEST_SOCKET_BASE = 80
# A directory without a mark is in the making, or its maker was killed in that moment; after so long it is the latter.
_UNMARKED_MAX_S = 3600.0
_REMOVE_TIMEOUT_S = 600.0
_NAMED_LEFTOVERS = 5


def candidate_bases(environment: Mapping[str, str]) -> list[Path]:
    """The directories that may hold scratch, in order: `$SLURM_TMPDIR`, `$TMPDIR`, `/tmp`; each once."""
    named = [*(environment[name] for name in _CANDIDATES if environment.get(name)), _LAST_RESORT]
    return list(dict.fromkeys(Path(path) for path in named))


def choose_base(environment: Mapping[str, str]) -> Path:
    """The candidate with the most room; the first of equals.

    Raises:
        ContainerError: none of them can be written.
    """
    candidates = candidate_bases(environment)
    usable = [path for path in candidates if os.access(path, os.W_OK | os.X_OK)]
    if not usable:
        raise ContainerError(
            "No directory for scratch on this node can be written.",
            evidence=f"Tried: {', '.join(map(str, candidates))}.",
            remedy="Set TMPDIR to a directory on this node's own disk.",
        )
    return max(usable, key=free_bytes)


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


class Scratch:
    """Directories of one workspace on this node, marked with their owner.

    Args:
        base: the directory to make them in.
        owner: the process that they live and die with.

    Raises:
        OSError: they can't be made; nothing of them is left.
    """

    def __init__(self, base: Path, owner: Owner) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self.sockets = self.path
        try:
            if len(os.fsencode(self.path)) > _LONGEST_SOCKET_BASE:
                self.sockets = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_LAST_RESORT))
            self._furnish(owner)
        except OSError:
            # Without its mark nobody would know whose it is.
            for path in {self.path, self.sockets}:
                remove_tree(path)
            raise

    def _furnish(self, owner: Owner) -> None:
        for path in {self.path, self.sockets}:
            (path / _OWNER).write_text(str(owner))
        self.run = self._made(self.sockets, "run")
        self.private = self._made(self.path, "private")
        self.workspace = self._made(self.path, "workspace")
        self.tmp = self._made(self.path, "tmp")
        self.overlay = self._made(self.path, "overlay")
        self.working_dir = self._made(self.path, "working_dir")

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
        """Where the bundled server listens, as the node sees it. Its directory is bound into the container."""
        return self.run / "server.sock"

    @property
    def kept_server_socket(self) -> Path:
        """A second name for the server's socket, out of the container's reach."""
        return self.sockets / "server.sock"

    def write_private(self, name: str, text: str) -> Path:
        """Write a 0600 file that only this user can reach."""
        path = self.private / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        return path

    def new_overlay(self) -> None:
        """An empty overlay in place of one that a failed start may have begun."""
        remove_tree(self.overlay)
        self.overlay.mkdir(mode=0o700)


def find_scratch(bases: list[Path]) -> Iterator[tuple[Path, Owner | None]]:
    """This user's scratch directories below `bases`, with their owners; None where there is no mark and won't be one.

    One that is in the making, or whose mark can't be read now, is left out.
    """
    seen = set()
    for path in (path for base in bases for path in base.glob(f"{_PREFIX}*")):
        try:
            found = path.lstat()
        except OSError:
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))  # two bases may be one directory
        try:
            owner = _read_owner(path / _OWNER)
        except OSError:
            continue
        if owner is not None or clock.wall_s() - found.st_mtime > _UNMARKED_MAX_S:
            yield path, owner


def _read_owner(path: Path) -> Owner | None:
    """The mark; None if there is none, or it is none. Raises OSError where that can't be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return Owner.parse(file.read(_OWNER_MAX_BYTES).decode("utf-8", "replace"))


def remove_scratch(path: Path) -> list[str]:
    """Remove a scratch directory; its mark goes last, so that what can't be removed now is still known later.

    Returns: as `remove_tree`.
    """
    try:
        children = [child for child in path.iterdir() if child.name != _OWNER]
    except FileNotFoundError:
        return []  # another start found it too, and was first
    left = [text for child in children for text in remove_tree(child)]
    return left or remove_tree(path)


def remove_tree(path: Path) -> list[str]:
    """Remove a tree, also what belongs to subordinate ids of ours.

    Returns: what could not be removed, a path and its owner's id each; empty if nothing is left.
    """
    if path.exists():
        _remove_own(path)
    if path.exists() and os.getuid() != 0:
        _remove_in_user_namespace(path)
    return _name_leftovers(path) if path.exists() else []


def _remove_own(path: Path) -> None:
    """Remove a tree as far as this user can, opening directories that were closed on the way (overlay's `work`)."""

    def open_and_retry(function: object, name: str, error: object) -> None:
        # Never what the tree lies in: that is everybody's.
        for closed in (Path(name),) if Path(name) == path else (Path(name).parent, Path(name)):
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(closed.lstat().st_mode):
                    closed.chmod(0o700)
        with contextlib.suppress(OSError):
            shutil.rmtree(name) if Path(name).is_dir() and not Path(name).is_symlink() else Path(name).unlink()

    # onerror is deprecated in 3.12 for onexc, which 3.11 does not have; both call with three arguments.
    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=open_and_retry)
    else:
        shutil.rmtree(path, onerror=open_and_retry)


def _remove_in_user_namespace(path: Path) -> None:
    argv = [sys.executable, "-m", "hpc_workspace.node.remover", str(path)]
    # Whether it worked is seen on the disk.
    with contextlib.suppress(processes.ProgramTimeoutError, PrerequisiteError):
        processes.run(argv, timeout_s=_REMOVE_TIMEOUT_S)


def _name_leftovers(path: Path) -> list[str]:
    """The deepest things that are left, or that can't be looked into."""
    leaves = []
    for folder, directories, files in os.walk(path):
        if not directories or not os.access(folder, os.W_OK | os.X_OK):
            leaves += [Path(folder, name) for name in files] or [Path(folder)]
        else:
            leaves += [Path(folder, name) for name in files]
    named = []
    for leaf in leaves[:_NAMED_LEFTOVERS]:
        with contextlib.suppress(OSError):
            # A name may be any bytes; the record is UTF-8.
            shown = os.fsencode(leaf).decode("utf-8", "replace")
            named.append(f"{shown} (of user id {leaf.lstat().st_uid})")
    return named or [str(path)]
