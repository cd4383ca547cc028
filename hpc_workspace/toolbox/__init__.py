"""The toolbox: this interpreter, the bundled server and git as one directory that runs in any image, bound read-only.

It holds the interpreter's binary, its standard library, the shared objects that these name and the dynamic loader that
goes with them, so that it needs nothing of the image, not even a C library; and git with its own, if git is here. Made
once for each version, beside its final name, tried out, and then renamed: who loses a race throws his own away.

    <root>/toolbox-<python>-<digest>          one that is whole; its manifest's time is that of its last use, to a day
    <root>/.toolbox-<python>-<digest>.*.part  one in the making, or what is left of one that was broken; never used

What is old is left to others to remove.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hpc_workspace import clock
from hpc_workspace.errors import PrerequisiteError
from hpc_workspace.toolbox.make import make_toolbox, toolbox_key
from hpc_workspace.toolbox.manifest import MANIFEST, PREFIX, read_manifest, reasons_not_to_trust, verify_toolbox

__all__ = [
    "MANIFEST",
    "ensure_toolbox",
    "list_parts",
    "list_toolboxes",
    "set_aside",
    "toolbox_path",
    "verify_toolbox",
]

_NAME = re.compile(rf"{PREFIX}[^/]+-[0-9a-f]{{12}}")
_PART_NAME = re.compile(rf"\.{PREFIX}[^/]+\.part")
_USED_S = 24 * 3600.0
# Keeps what is left of a broken toolbox from being empty: rename(2) puts a directory over an empty one.
_BROKEN = "broken"


def ensure_toolbox(root: Path) -> Path:
    """The toolbox of this version below `root`, made if it is not there or was interrupted (about 5 s).

    Looked at each time: whether its manifest can be read and is its own, and whether anybody else could have written
    to it. Whether every file is as it was made is for `verify_toolbox` to say.

    Raises:
        PrerequisiteError: it can't be made here (no ldd, no room), does not run here, is not what its name says, or
            is or could have been somebody else's work.
    """
    target = toolbox_path(root)
    if not _is_usable(target):
        _publish(root, target)
    _note_use(target / MANIFEST)
    return target


def toolbox_path(root: Path) -> Path:
    """Where this version's toolbox is below `root`, or will be."""
    return root / f"{PREFIX}{toolbox_key()}"


def list_toolboxes(root: Path) -> list[Path]:
    """The toolboxes of all versions below `root`; whether they are whole is not looked at."""
    return _directories(root, _NAME)


def list_parts(root: Path) -> list[Path]:
    """What is left below `root` of makers that were killed and of toolboxes that were broken; or is being made."""
    return _directories(root, _PART_NAME)


def set_aside(path: Path) -> Path:
    """Rename a toolbox so that nobody takes it any more. Returns its new name, one of `list_parts`.

    Raises:
        OSError: it is gone, or its directory can't be written.
    """
    if _PART_NAME.fullmatch(path.name):
        return path
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    path.rename(aside)
    return aside


def _directories(root: Path, name: re.Pattern[str]) -> list[Path]:
    try:
        found = [path for path in root.iterdir() if name.fullmatch(path.name)]
        return sorted(path for path in found if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []


def _is_usable(target: Path) -> bool:
    """Whether it can be used as it is. False: it is not there, or has no manifest: somebody was interrupted.

    Raises:
        PrerequisiteError: it is there, and can neither be used nor replaced.
    """
    try:
        if reasons := reasons_not_to_trust(target.stat()):
            raise _unusable(target, f"It {' and '.join(reasons)}.")
        manifest = read_manifest(target)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unusable(target, str(error)) from error
    if manifest is not None and target.name != f"{PREFIX}{manifest.get('key')}":
        raise _unusable(target, f"Its {MANIFEST} is of another one: {manifest.get('key')}.")
    return manifest is not None


def _unusable(target: Path, evidence: str) -> PrerequisiteError:
    return PrerequisiteError(
        f"The toolbox {target} can't be used.",
        evidence=evidence,
        remedy="Remove that directory; or set cache_dir (or HPC_WORKSPACE_CACHE) to one that only you can write.",
    )


def _note_use(manifest: Path) -> None:
    """Let the manifest's time say, to a day, when the toolbox was last used."""
    with contextlib.suppress(OSError):  # a store that only its maker can write
        if clock.wall_s() - manifest.stat().st_mtime > _USED_S:
            os.utime(manifest)


def _publish(root: Path, target: Path) -> None:
    """Make the toolbox aside and put it in its place, unless somebody else was faster.

    Raises:
        PrerequisiteError: as `ensure_toolbox`.
    """
    aside = root / f".{target.name}.{secrets.token_hex(6)}.part"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_toolbox(aside)
        _put_in_place(aside, target)
        os.listdir(root)  # so that NFS looks anew, and sees the winner's
    except OSError as error:
        raise PrerequisiteError(
            f"The toolbox for the bundled server can't be made in {root}.",
            # copytree tells of every file that it could not copy.
            evidence=str(error.args[0][0][-1] if isinstance(error, shutil.Error) else error),
            remedy="Set cache_dir (or HPC_WORKSPACE_CACHE) to a directory with 150 MB of room.",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if not _is_usable(target):
        raise _unusable(target, "It is incomplete, and was not replaced.")


def _put_in_place(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`, and what is broken there out of the way. A whole one that is there stays.

    Safe with many at once, on rename(2) alone: the grave of a broken one has its inode's number for a name and is never
    empty, so that whoever comes late, and would take away what another has just put there, fails.
    """
    grave = _bury(target)
    with _passing_over(errno.ENOTEMPTY, errno.EEXIST):  # somebody else's is there
        aside.rename(target)
    if grave is not None:
        for name in set(os.listdir(grave)) - {_BROKEN}:
            _remove(grave / name)


def _bury(target: Path) -> Path | None:
    """Rename a broken toolbox; returns its new name. None if there is none, or it is whole, or another one did it."""
    with contextlib.ExitStack() as opened:
        try:
            folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        opened.callback(os.close, folder)
        if read_manifest(target, dir_fd=folder) is not None:
            return None
        os.close(os.open(_BROKEN, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder))
        grave = target.with_name(f".{target.name}.{os.fstat(folder).st_ino}.part")
        with _passing_over(errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            target.rename(grave)
            return grave
    return None


@contextlib.contextmanager
def _passing_over(*numbers: int) -> Iterator[None]:
    """Ends the block without an error at an OSError with one of these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


def _remove(path: Path) -> None:
    """Remove a file or a tree, as far as that goes: the rest is in nobody's way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
